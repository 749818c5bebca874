"""Two transfers of one chunk never mix: whatever they bring, and in whatever order, a marked chunk has its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.chunkmap import ABSENT
from headrace.cache.digest import XXH3, chunk_digest
from headrace.cache.filling import Corrupt, Filling, Stopped
from headrace.cache.grid import Grid
from headrace.cache.landing import Landing, LandingSink, MemorySink
from headrace.cache.manifest import ManifestFile
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter, create, read_exactly
from headrace.cache.origins.protocol import Pin
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress

LENGTH = 40
TRUTH = bytes(range(LENGTH))
DIGEST = chunk_digest(XXH3, TRUTH)
GRID = Grid((LENGTH, LENGTH))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def filling_in(folder: Path, number: int) -> Filling:
    file = ManifestFile("a", GRID.size, GRID, pin=Pin("etag", "1"))
    spec = ObjectSpec(f"{number:064x}", "key", GRID, XXH3)
    (folder / "tmp").mkdir(exist_ok=True)
    create(spec, ObjectFolder(folder / spec.id), folder / "tmp")
    return Filling(file, ObjectWriter(ObjectFolder(folder / spec.id), spec))


# Pieces of each of the two transfers: how long, whether its bytes are wrong. Then whose turn it is.
pieces = st.lists(st.tuples(st.integers(1, 25), st.booleans()), min_size=1, max_size=8)
turns = st.lists(st.booleans(), max_size=16)
numbers = iter(range(1 << 60))


def cut(plan: list[tuple[int, bool]]) -> list[bytes]:
    """The chunk in pieces, some of them wrong."""
    found, at = [], 0
    for length, wrong in [*plan, (LENGTH, False)]:
        piece = TRUTH[at : at + length]
        at += len(piece)
        if piece:
            found.append(bytes(b ^ 0xFF for b in piece) if wrong else piece)
    return found


@settings(max_examples=150, deadline=None)
@given(first=pieces, second=pieces, order=turns)
def test_a_hedge_beside_a_transfer(
    folder: Path, first: list[tuple[int, bool]], second: list[tuple[int, bool]], order: list[bool]
) -> None:
    filling = filling_in(folder, next(numbers))
    progress, told = Progress(), list[tuple[int, bytes]]()
    try:
        assert filling.claim(0, 1)
        landing = Landing(filling, 0)

        def landed(index: int, digest: bytes) -> None:
            told.append((index, digest))

        sinks: dict[bool, LandingSink | MemorySink] = {
            True: LandingSink([landing], progress, "peer", Pace(), expected=[DIGEST], landed=landed),
            False: MemorySink(landing, progress, "peer", Pace(), expected=DIGEST, landed=landed),
        }
        left = {True: cut(first), False: cut(second)}
        right = {who: b"".join(left[who]) == TRUTH for who in left}
        for who in [*order, *[True] * 20, *[False] * 20]:
            if not left[who]:
                continue
            try:
                sinks[who].put(left[who].pop(0))
            except Corrupt:
                assert not right[who]
                left[who] = []
            if filling.writer.map.state(0) != ABSENT:
                assert read_exactly(filling.writer.fileno(), 0, LENGTH) == TRUTH
                assert filling.writer.learned.get(0) == DIGEST
        assert told == [(0, DIGEST)] * any(right.values())
        assert progress.fetched["peer"] == LENGTH * any(right.values())
    finally:
        filling.writer.close()


def test_who_was_stopped_writes_nothing_more(folder: Path) -> None:
    filling = filling_in(folder, next(numbers))
    pace = Pace()
    pace.set("demand", {"peers": 0.0})
    landing = Landing(filling, 0)
    sinks: list[LandingSink | MemorySink] = [
        LandingSink([landing], Progress(), "peer", pace, expected=[DIGEST], landed=lambda *_: None),
        MemorySink(landing, Progress(), "peer", pace, expected=DIGEST, landed=lambda *_: None),
    ]
    for sink in sinks:
        sink.stop()
        with pytest.raises(Stopped):
            sink.put(TRUTH)
    assert filling.writer.map.state(0) == ABSENT
    filling.writer.close()
