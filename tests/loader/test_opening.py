"""Opening overlaps with reading, and an error in either ends both."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from support.safetensors_files import entry, file_bytes, raw_file, write_sharded
from support.tensors import bits

from headrace.cache.errors import CheckpointError
from headrace.cache.safetensors import parse_header
from headrace.loader import load, opening
from headrace.loader.choose import ReadPath
from headrace.loader.plan import Block
from headrace.loader.readers.reader import FileReader

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct", "auto")


@pytest.mark.parametrize("read_path", PATHS)
def test_a_file_is_being_read_while_its_header_is_parsed(
    read_path: ReadPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry("a", "F32", (300_001,)), entry("e", "F32", (0,)), entry("b", "U8", (77,))]
    (tmp_path / "m.safetensors").write_bytes(file_bytes(entries, shift=3))
    arrived = threading.Event()
    read, parse = FileReader.read, parse_header

    def reading(self: FileReader, block: Block) -> None:
        read(self, block)
        arrived.set()

    def parsing(*arguments: Any) -> Any:
        assert arrived.wait(30), "nothing was read before the header was parsed"
        return parse(*arguments)

    monkeypatch.setattr(FileReader, "read", reading)
    monkeypatch.setattr(opening, "parse_header", parsing)
    loaded = load(tmp_path, read_path=read_path)
    assert {name: bits(one) for name, one in loaded.tensors.items()} == {e.name: e.data for e in entries}
    assert len(loaded.stats.explain) == 1


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("shard", ["a", "b", "c"])
def test_a_bad_header_among_good_ones_is_the_error_that_shows(
    read_path: ReadPath, shard: str, tmp_path: Path
) -> None:
    shards = {f"{name}.safetensors": [entry(name, "U8", (500_000,))] for name in "abc"}
    write_sharded(tmp_path, shards)
    (tmp_path / f"{shard}.safetensors").write_bytes(
        raw_file(b'{"x":{"dtype":"U8"}}', random.Random(1).randbytes(5000))
    )
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=rf"{shard}\.safetensors has a damaged header"):
        load(tmp_path, read_path=read_path)
    assert threading.active_count() == before


@pytest.mark.parametrize("read_path", PATHS)
def test_many_shards_are_opened_and_right(read_path: ReadPath, tmp_path: Path) -> None:
    shards = {f"{n:03}.safetensors": [entry(f"t{n}", "BF16", (n * 7,), n)] for n in range(100)}
    write_sharded(tmp_path, shards, "model.safetensors.index.json")
    loaded = load(tmp_path, read_path=read_path)
    assert {name: bits(one) for name, one in loaded.tensors.items()} == {
        one.name: one.data for (one,) in shards.values()
    }
    assert loaded.stats.files == len(loaded.stats.explain) == 100
