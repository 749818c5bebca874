"""The window over the plan."""

from __future__ import annotations

from headrace.cache.policy.window import Window


def test_it_spans_a_share_of_the_bytes_from_the_first_awaited_chunk() -> None:
    window = Window([10] * 100, range(100), 0.05, 1)
    assert list(window.advance()) == [0, 1, 2, 3, 4]
    window.passed(2)
    assert list(window.advance()) == []
    window.passed(0)
    window.passed(1)
    assert list(window.advance()) == [5, 6, 7]
    assert (window.first, window.end) == (3, 8)


def test_it_spans_some_chunks_however_large_they_are() -> None:
    window = Window([1000, 1000, 1, 1, 1], range(5), 0.05, 2)
    assert list(window.advance()) == [0, 1]


def test_bytes_count_not_chunks() -> None:
    window = Window([50, 1, 1, 1, 47], range(5), 0.53, 1)
    assert list(window.advance()) == [0, 1, 2, 3]


def test_it_follows_the_order_of_the_plan() -> None:
    window = Window([10] * 6, [5, 3, 1], 0.1, 2)
    assert list(window.advance()) == [5, 3]
    window.passed(5)
    assert list(window.advance()) == [1]
    assert window.place(0) == -1
    assert not window.open(0)


def test_what_is_awaited_again_holds_it_back() -> None:
    window = Window([10] * 10, range(10), 0.2, 2)
    window.advance()
    for chunk in (0, 1, 2):
        window.passed(chunk)
    window.advance()
    assert (window.first, window.end) == (3, 5)
    window.back(1)
    for chunk in (3, 4):
        window.passed(chunk)
    assert list(window.advance()) == []
    window.passed(1)
    assert list(window.advance()) == [5, 6]


def test_it_ends_with_the_plan() -> None:
    window = Window([10] * 3, range(3), 1.0, 1)
    assert list(window.advance()) == [0, 1, 2]
    for chunk in range(3):
        window.passed(chunk)
    assert list(window.advance()) == []
    assert window.first == window.end == 3


def test_an_empty_plan_has_nothing_to_open() -> None:
    assert list(Window([], [], 0.05, 4).advance()) == []
