"""What nodes keep for each other: whole, or not at all."""

from __future__ import annotations

import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.tracker.values import LARGEST, Seals

OLD, NEW, OTHER = (b"old secret of ours", b"new secret of ours", b"a stranger's secret")


@given(st.binary(max_size=3000), st.sampled_from([(), (NEW,), (NEW, OLD)]))
def test_a_value_comes_back_as_it_was(value: bytes, secrets: tuple[bytes, ...]) -> None:
    seals = Seals(secrets)
    kept = seals.pack("key", value, 60.0)
    assert kept is not None
    assert seals.unpack("key", kept) == (value, 60.0)


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_changed_value_is_ignored(value: bytes, data: st.DataObject) -> None:
    seals = Seals((NEW,))
    kept = bytearray(seals.pack("key", value, 60.0) or b"")
    kept[data.draw(st.integers(0, len(kept) - 1))] ^= data.draw(st.integers(1, 255))
    assert seals.unpack("key", bytes(kept)) is None


def test_secrets_change_one_node_after_the_other() -> None:
    before, between, after = Seals((OLD,)), Seals((NEW, OLD)), Seals((NEW,))
    for writer, reader in ((before, between), (between, after), (between, between)):
        assert reader.unpack("key", writer.pack("key", b"value", 1.0) or b"") == (b"value", 1.0)
        assert reader.unpack_digest("s", 7, writer.pack_digest("s", 7, b"d" * 16)) == b"d" * 16


def test_what_a_stranger_put_there_is_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = Seals((NEW,)), Seals((OTHER,))
    with caplog.at_level(logging.WARNING):
        for planted in (
            theirs.pack("key", b"value", 1.0),
            Seals().pack("key", b"value", 1.0),
            b"",
            b"\0" * 40,
        ):
            assert ours.unpack("key", planted or b"") is None
        assert ours.unpack_digest("s", 7, theirs.pack_digest("s", 7, b"d" * 16)) is None
    assert len(caplog.records) == 1


def test_a_value_or_digest_holds_only_where_it_was_kept() -> None:
    seals = Seals((NEW,))
    assert seals.unpack("another key", seals.pack("key", b"value", 1.0) or b"") is None
    digest = seals.pack_digest("swarm", 7, b"d" * 16)
    assert seals.unpack_digest("swarm", 8, digest) is None
    assert seals.unpack_digest("another", 7, digest) is None


def test_large_values_are_compressed_and_very_large_ones_are_not_kept() -> None:
    seals = Seals()
    kept = seals.pack("key", b"a" * 1_000_000, 1.0)
    assert kept is not None and len(kept) < 10_000
    assert seals.pack("key", random.Random(1).randbytes(LARGEST + 1), 1.0) is None


def test_a_value_that_would_grow_too_large_is_ignored() -> None:
    import struct
    import zlib

    bomb = struct.pack(">Bd", 1, 1.0) + zlib.compress(bytes(LARGEST + 1))
    assert Seals().unpack("key", bomb) is None


@pytest.mark.parametrize("digest", [b"", b"d" * 65])
def test_what_is_no_digest_is_not_kept(digest: bytes) -> None:
    with pytest.raises(ValueError, match="digest"):
        Seals().pack_digest("swarm", 1, digest)
