"""Verifying while loading: every byte that is handed out was compared with its digest, and wrong ones are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.digested_source import DigestedSource
from support.host_device import HostDevice
from support.safetensors_files import Entry, entry, file_bytes, write_sharded
from support.tensors import bits

from headrace.cache.errors import IntegrityError, StoreError, UsageError
from headrace.cache.grid import Grid, by_tensors, fixed
from headrace.cache.safetensors import parse_header
from headrace.loader import SlicePlan, load, plan, stream, verify
from headrace.loader.choose import ReadPath
from headrace.loader.slices import Rule, Split

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct")
BLOCK = 64 * 1024
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and runs in little data."""
    monkeypatch.setattr(plan, "BLOCK", BLOCK)
    monkeypatch.setattr(verify, "BLOCK", BLOCK)
    monkeypatch.setattr(verify, "_SMALL", BLOCK // 8)
    monkeypatch.setattr(verify, "_PIECE", 10_000)


def grid_of(content: bytes, chunk: int = 1 << 20) -> Grid:
    length = int.from_bytes(content[:8], "little")
    header = parse_header(content[8 : 8 + length], len(content), "m")
    base = header.data_start
    infos = header.tensors.values()
    return by_tensors(len(content), base, [(base + i.start, base + i.stop) for i in infos], chunk)


ENTRIES = [
    entry(f"t{number}", dtype, (size,))
    for number, (dtype, size) in enumerate(
        [
            ("BF16", 30_000),
            ("F32", 500),
            ("U8", 7),
            ("F32", 100_000),
            ("I64", 0),
            ("BF16", 90_001),
            ("F16", 40),
            ("U8", 3),
            ("F32", 33_333),
        ]
    )
]
CONTENT = file_bytes(ENTRIES, shift=3)
GRID = grid_of(CONTENT, 100_000)
DATA_CHUNKS = [(index, *GRID.span(index, index + 1)) for index in range(1, len(GRID))]
"""(number, start, stop) of each behind the header."""
EXPECTED = {one.name: one.data for one in ENTRIES}
BASE = len(CONTENT) - sum(len(one.data) for one in ENTRIES)


@pytest.fixture
def model(tmp_path: Path) -> DigestedSource:
    return DigestedSource(tmp_path, {FILE: CONTENT}, {FILE: GRID})


def offset_of(name: str) -> int:
    """The file offset of a tensor's first byte."""
    return BASE + sum(len(one.data) for one in itertools.takewhile(lambda e: e.name != name, ENTRIES))


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_right_file_is_loaded_verified_and_noted(
    read_path: ReadPath, threads: int, model: DigestedSource
) -> None:
    loaded = load(model, read_path=read_path, threads=threads, verify="always")
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == EXPECTED
    assert loaded.stats.verified == len(CONTENT)
    assert loaded.stats.explain[0].endswith("verified, as asked")
    assert model.notes == [(FILE, True)]


@pytest.mark.parametrize("read_path", PATHS)
def test_a_wrong_byte_anywhere_is_an_error_that_says_where(
    read_path: ReadPath, model: DigestedSource
) -> None:
    for index, start, stop in DATA_CHUNKS:
        for offset in (start, stop - 1):
            model.damage(FILE, offset)
            with pytest.raises(IntegrityError) as caught:
                load(model, read_path=read_path, verify="always", threads=2)
            model.damage(FILE, offset)
            names = [
                one.name
                for one in ENTRIES
                if one.data and offset_of(one.name) < stop and offset_of(one.name) + len(one.data) > start
            ]
            assert str(caught.value) == (
                f"chunk {index} of {FILE}, bytes {start} to {stop}, with {', '.join(names)}, does not have its "
                "digest: run `headrace verify --repair`"
            )
    assert model.notes == [(FILE, False)] * 2 * len(DATA_CHUNKS)


def test_a_wrong_header_is_not_even_parsed(model: DigestedSource) -> None:
    for offset in (0, 7, 8, 50, BASE - 1):
        model.damage(FILE, offset)
        with pytest.raises(IntegrityError, match=f"chunk 0 of {FILE}, bytes 0 to {BASE}, does not have"):
            load(model, verify="always")
        model.damage(FILE, offset)


def test_a_wrong_index_is_not_even_parsed(tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    write_sharded(tmp_path / "made", {FILE: ENTRIES}, index)
    text = (tmp_path / "made" / index).read_bytes()
    files = {FILE: CONTENT, index: text}
    source = DigestedSource(tmp_path / "model", files, {FILE: GRID, index: fixed(len(text))})
    assert len(load(source, verify="always").tensors) == len(ENTRIES)
    source.damage(index, text.index(b"t3"))
    with pytest.raises(IntegrityError, match=r"chunk 0 of model\.safetensors\.index\.json"):
        load(source, verify="always")


@pytest.mark.parametrize("read_path", PATHS)
def test_a_stream_yields_a_tensor_only_when_all_its_chunks_are_right(
    read_path: ReadPath, model: DigestedSource
) -> None:
    for index, start, stop in DATA_CHUNKS:
        model.damage(FILE, (start + stop) // 2)
        got: dict[str, bytes] = {}
        with pytest.raises(IntegrityError, match=f"chunk {index} of"):
            for name, tensor in stream(model, read_path=read_path, verify="always", threads=2):
                got[name] = bits(tensor)
        model.damage(FILE, (start + stop) // 2)
        for name, data in got.items():
            begin = offset_of(name)
            assert data == EXPECTED[name]
            assert not data or begin >= stop or begin + len(data) <= start, name


@pytest.mark.parametrize("read_path", PATHS)
def test_a_selection_is_verified_with_the_rest_of_its_chunks(
    read_path: ReadPath, model: DigestedSource
) -> None:
    first, last = GRID.covering(offset_of("t6"), offset_of("t6") + 80)
    assert last - first == 1
    start, stop = GRID.span(first, last)
    assert stop - start > 80  # it shares its chunk
    loaded = load(model, names=["t6"], read_path=read_path, verify="always")
    assert bits(loaded.tensors["t6"]) == EXPECTED["t6"]
    assert loaded.stats.verified == BASE + stop - start
    assert model.notes == []  # not all of the file was looked at
    for offset in (start, stop - 1):
        model.damage(FILE, offset)
        with pytest.raises(IntegrityError):
            load(model, names=["t6"], read_path=read_path, verify="always")
        model.damage(FILE, offset)
    for offset in (start - 1, stop):
        model.damage(FILE, offset)
        load(model, names=["t6"], read_path=read_path, verify="always")
        model.damage(FILE, offset)


def test_tensors_on_a_device_are_verified(model: DigestedSource) -> None:
    with HostDevice(delay=0.001) as device:
        loaded = load(model, device, verify="always", threads=2)
        assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == EXPECTED
        assert loaded.stats.verified == len(CONTENT)
        del loaded
    for offset in (offset_of("t3") + 1000, len(CONTENT) - 1):
        model.damage(FILE, offset)
        with HostDevice(delay=0.001) as device, pytest.raises(IntegrityError):
            load(model, device, verify="always", threads=2)
        model.damage(FILE, offset)


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("on_device", [False, True])
def test_slices_are_verified_with_all_of_the_chunks_that_they_touch(
    read_path: ReadPath, on_device: bool, tmp_path: Path
) -> None:
    entries = [entry(name, "F32", (64, 512)) for name in ("rows", "columns", "other")]
    content = file_bytes(entries, shift=5)
    grid = grid_of(content, 65_536)
    source = DigestedSource(tmp_path, {FILE: content}, {FILE: grid})
    base = len(content) - 3 * 64 * 512 * 4
    slices = SlicePlan(1, 2, (Rule("rows", Split(0)), Rule("columns", Split(1))))

    def read() -> dict[str, bytes]:
        with HostDevice(delay=0.001) as device:
            target = device if on_device else "cpu"
            loaded = load(
                source, target, names=["rows", "columns"], slices=slices, read_path=read_path, verify="always"
            )
            assert loaded.stats.verified >= 3 * 65_536
            return {name: bits(tensor) for name, tensor in loaded.tensors.items()}

    whole = torch.frombuffer(bytearray(entries[1].data), dtype=torch.uint8).view(64, 2048)
    expected = {"rows": entries[0].data[65_536:], "columns": bits(whole[:, 1024:])}
    assert read() == expected
    for place, needed in ((0, False), (65_536, True), (131_072, True), (262_143, True), (262_144, False)):
        source.damage(FILE, base + place)
        if needed:
            index = grid.covering(base + place, base + place + 1)[0]
            with pytest.raises(
                IntegrityError, match=f"chunk {index} of .* with {'rows' if place < 131_072 else 'columns'}"
            ):
                read()
        else:
            assert read() == expected
        source.damage(FILE, base + place)


@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3"])
def test_digests_of_either_kind_are_compared(algorithm: str, tmp_path: Path) -> None:
    source = DigestedSource(tmp_path, {FILE: CONTENT}, {FILE: GRID}, algorithm)
    assert load(source, verify="always").stats.verified == len(CONTENT)
    source.damage(FILE, len(CONTENT) - 5)
    with pytest.raises(IntegrityError):
        load(source, verify="always")


@pytest.mark.parametrize(
    ("mode", "last", "verified"),
    [
        ("always", "this boot", True),
        ("boot", "this boot", False),
        ("boot", "earlier boot", True),
        ("boot", "never", True),
        ("boot", "unknown", True),
        ("auto", "this boot", False),
        ("auto", "earlier boot", False),
        ("auto", "never", True),
        ("auto", "unknown", False),
        ("never", "never", False),
    ],
)
def test_the_mode_and_the_store_s_note_decide(
    mode: verify.VerifyMode, last: str, verified: bool, model: DigestedSource
) -> None:
    model.last = last  # type: ignore[assignment]
    assert (load(model, verify=mode).stats.verified > 0) is verified
    assert [name for name, _ in stream(model, verify=mode)] != []
    assert model.notes == ([(FILE, True)] * 2 if verified else [])


@pytest.mark.parametrize("mode", ["always", "boot"])
def test_what_cannot_be_verified_is_refused_only_if_it_was_asked_for(
    mode: verify.VerifyMode, model: DigestedSource, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    with pytest.raises(UsageError, match="a plain folder or file has no digests"):
        load(folder, verify=mode)
    with pytest.raises(UsageError, match="a plain folder or file has no digests"):
        list(stream(folder, verify=mode))
    model.readable, model.last = False, "never"
    with pytest.raises(UsageError, match="the store shows them to its owner alone"):
        load(model, verify=mode)
    for source in (folder, model):
        assert load(source).stats.verified == 0
        assert load(source, verify="never").stats.verified == 0


def test_an_unknown_mode_is_refused(model: DigestedSource) -> None:
    with pytest.raises(UsageError, match="must be one of auto, always, boot, never, not 'sometimes'"):
        load(model, verify="sometimes")  # type: ignore[arg-type]


def test_a_lost_digest_is_an_error(model: DigestedSource) -> None:
    model.digests[FILE][3] = None
    with pytest.raises(StoreError, match=f"has lost the digest of chunk 3 of {FILE}"):
        load(model, verify="always")
    assert load(model, verify="never").stats.tensors == len(ENTRIES)


def test_a_wrong_chunk_that_is_only_read_over_between_two_tensors_does_not_matter(tmp_path: Path) -> None:
    entries = [entry("a", "U8", (1,)), entry("between", "U8", (4096,)), entry("b", "U8", (1,))]
    content = file_bytes(entries)
    base = len(content) - 4098
    source = DigestedSource(tmp_path, {FILE: content}, {FILE: Grid((base, 1, 4096, 1))})
    source.damage(FILE, base + 100)
    for read_path in PATHS:
        loaded = load(source, names={"a", "b"}, read_path=read_path, verify="always")
        assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
            one.name: one.data for one in entries if one.name != "between"
        }


@st.composite
def files(draw: st.DrawFn) -> tuple[list[Entry], bytes, Grid]:
    sizes = draw(
        st.lists(st.sampled_from([0, 1, 5, 700, 4096, 5000, 40_000, 65_536, 150_000]), min_size=1, max_size=9)
    )
    entries = [entry(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]
    content = file_bytes(entries, shift=draw(st.sampled_from([0, 1, 3000])))
    kind = draw(st.sampled_from(["tensors", "fixed", "any"]))
    if kind == "tensors":
        grid = grid_of(content, draw(st.sampled_from([65_536, 200_000])))
    elif kind == "fixed":
        grid = fixed(len(content), draw(st.sampled_from([1000, 4096, 70_000, 1 << 20])))
    else:
        cuts = draw(st.sets(st.integers(1, len(content) - 1), max_size=12))
        edges = [0, *sorted(cuts), len(content)]
        grid = Grid(tuple(b - a for a, b in itertools.pairwise(edges)))
    return entries, content, grid


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=files(),
    chosen=st.sets(st.integers(0, 8)),
    read_path=st.sampled_from(PATHS),
    streaming=st.booleans(),
    threads=st.integers(1, 3),
    place=st.floats(0, 1, exclude_max=True),
)
def test_on_any_grid_and_any_selection_exactly_the_needed_chunks_are_verified(
    file: tuple[list[Entry], bytes, Grid],
    chosen: set[int],
    read_path: ReadPath,
    streaming: bool,
    threads: int,
    place: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    entries, content, grid = file
    source = DigestedSource(tmp_path_factory.mktemp("m"), {FILE: content}, {FILE: grid})
    names = {one.name for number, one in enumerate(entries) if number in chosen} or None
    base = len(content) - sum(len(one.data) for one in entries)
    expected = {one.name: one.data for one in entries if names is None or one.name in names}

    def read() -> Iterator[tuple[str, bytes]]:
        if streaming:
            found = stream(source, names=names, read_path=read_path, threads=threads, verify="always")
            return ((name, bits(tensor)) for name, tensor in found)
        loaded = load(source, names=names, read_path=read_path, threads=threads, verify="always")
        assert loaded.stats.verified >= sum(map(len, expected.values()))
        return ((name, bits(tensor)) for name, tensor in loaded.tensors.items())

    assert dict(read()) == expected
    # A wrong byte in a chunk that brings bytes of the header or of what was asked for is found.
    needed = {*range(grid.covering(0, base)[1])}
    start = base
    for one in entries:
        if one.name in expected:
            needed |= {*range(*grid.covering(start, start + len(one.data)))}
        start += len(one.data)
    offset = int(place * len(content))
    source.damage(FILE, offset)
    index = grid.covering(offset, offset + 1)[0]
    if index in needed:
        with pytest.raises(IntegrityError, match=f"chunk {index} of {FILE}"):
            dict(read())
    else:
        got = dict(read())
        assert {name: len(data) for name, data in got.items()} == {n: len(d) for n, d in expected.items()}
