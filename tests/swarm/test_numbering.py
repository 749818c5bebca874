"""The numbers of a snapshot's chunks, and bitmaps over them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.grid import Grid
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.numbering import Numbering, pack, unpack
from headrace.cache.origins.protocol import Pin

lengths = st.lists(st.integers(1, 9), max_size=5).map(tuple)


@given(grids=st.lists(lengths, min_size=1, max_size=6), twice=st.booleans())
def test_every_chunk_has_one_number(grids: list[tuple[int, ...]], twice: bool) -> None:
    files = [
        ManifestFile(f"{i:02}", sum(grid), Grid(grid), pin=Pin("etag", "x")) for i, grid in enumerate(grids)
    ]
    if twice:
        digest = "sha256:" + "0" * 64
        files += [ManifestFile(f"twin{i}", 7, Grid((7,)), digest, pin=Pin("etag", "x")) for i in range(2)]
    manifest = Manifest(tuple(files), uri="s3://b/m")
    numbering = Numbering.of(manifest, "default")
    assert numbering.chunks == sum(map(len, grids)) + twice
    places = [numbering.locate(number) for number in range(numbering.chunks)]
    assert len(set(places)) == len(places)
    for number, (at, index) in enumerate(places):
        assert numbering.number(at, index) == number
        assert numbering.files[at].grid.lengths[index] == numbering.sizes[number]


@given(st.sets(st.integers(0, 99)), st.integers(100, 130))
def test_a_bitmap_says_what_was_put_in(numbers: set[int], count: int) -> None:
    packed = pack(numbers, count)
    assert len(packed) == -(-count // 8)
    assert unpack(packed, count) == sorted(numbers)
