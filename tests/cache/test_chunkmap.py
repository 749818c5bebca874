"""The chunk map against a list of bytes, and what a reboot does to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.cache import chunkmap
from headrace.cache.chunkmap import ABSENT, DURABLE, WRITTEN, ChunkMap
from headrace.cache.errors import StoreError

OTHER_BOOT = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "map"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([ABSENT, WRITTEN, DURABLE]), max_size=300), st.data())
def test_it_behaves_like_a_list_of_states(tmp_path: Path, states: list[int], data: st.DataObject) -> None:
    path = tmp_path / "map"
    path.unlink(missing_ok=True)
    ChunkMap.create(path, len(states))
    with ChunkMap.open(path, writable=True) as written, ChunkMap.open(path, writable=False) as read:
        for index, state in enumerate(states):
            written.mark(index, state)
        assert list(read.states()) == states
        assert read.full == (ABSENT not in states)
        start = data.draw(st.integers(0, len(states)))
        absent = [i for i, s in enumerate(states) if s == ABSENT and i >= start]
        assert read.next_absent(start) == (absent[0] if absent else -1)
        limit = data.draw(st.integers(start, len(states)))
        end = read.absent_run(start, limit)
        assert all(s == ABSENT for s in states[start:end])
        assert end == limit or states[end] != ABSENT
        assert read.ready(start, limit) == (ABSENT not in states[start:limit])


def test_what_was_only_written_on_an_earlier_boot_is_not_readable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ChunkMap.create(path, 2)
    with ChunkMap.open(path, writable=True) as one:
        one.mark(0, DURABLE)
        one.mark(1, WRITTEN)
        assert one.ready(0, 2)
    monkeypatch.setattr(chunkmap, "boot_id", lambda: OTHER_BOOT)
    with ChunkMap.open(path, writable=True) as one:
        assert not one.current
        assert one.ready(0, 1)
        assert not one.ready(1, 2)
        assert not one.full
        one.set_current()
        assert one.full


def test_verified_holds_for_the_boot_it_was_set_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ChunkMap.create(path, 1)
    with ChunkMap.open(path, writable=True) as one:
        assert one.verified_this_boot  # as long as there is nothing in it
    monkeypatch.setattr(chunkmap, "boot_id", lambda: OTHER_BOOT)
    with ChunkMap.open(path, writable=True) as one:
        assert not one.verified_this_boot
        assert one.verified_ever
        one.forget_verified()
        assert not one.verified_ever
        one.set_verified()
        assert one.verified_this_boot
        assert one.verified_ever


def test_wanted_chunks_are_told_until_they_are_there(path: Path) -> None:
    ChunkMap.create(path, 10)
    with ChunkMap.open(path, writable=True) as stager, ChunkMap.open(path, writable=True) as reader:
        reader.want(3, 6)
        assert list(stager.wanted()) == [3, 4, 5]
        stager.mark(4, WRITTEN)
        assert list(stager.wanted()) == [3, 5]
        stager.mark(4, ABSENT)
        assert list(stager.wanted()) == [3, 5]  # the wish was fulfilled once and is forgotten


def test_the_file_is_allocated_not_sparse(path: Path) -> None:
    ChunkMap.create(path, 100_000)
    assert os.stat(path).st_blocks * 512 >= 200_000


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * 8192, b"HRCHUNKS" + b"\xff" * 8192])
def test_a_damaged_map_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match="verify --repair"):
        ChunkMap.open(path, writable=False)
