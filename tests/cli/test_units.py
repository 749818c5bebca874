"""Sizes and times as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.errors import UsageError
from headrace.cli.units import count, parse_size, show_age, show_seconds, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("16MiB", 16 << 20),
        ("16M", 16 << 20),
        ("16 mb", 16_000_000),
        ("1.5GiB", 3 << 29),
        ("200GB", 200 * 10**9),
        ("2T", 2 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1e6", "-1", "16Q", "1.MB", "iB", "1iB", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="16MiB"):
        parse_size(text)


@given(st.integers(0, 10**15))
def test_a_shown_size_is_near_the_size(size: int) -> None:
    shown = parse_size(show_size(size))
    assert abs(shown - size) <= size / 150
    assert len(show_size(size)) <= 8


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.004, "0.00 s"), (9.994, "9.99 s"), (42.26, "42.3 s"), (185, "3:05"), (7385, "2:03:05")],
)
def test_seconds_are_shown_shortly(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("age", "shown"), [(3, "just now"), (310, "5 min ago"), (7300, "2 h ago"), (900_000, "10 d ago")]
)
def test_ages_are_shown_roughly(age: float, shown: str) -> None:
    assert show_age(age) == shown


def test_nouns_agree_with_their_numbers() -> None:
    assert [count(0, "file"), count(1, "file"), count(1200, "file")] == ["0 files", "1 file", "1,200 files"]
