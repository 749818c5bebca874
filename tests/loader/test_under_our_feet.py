"""Files that change while they are loaded, and memory that runs out: errors, never the end of the process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.filling_source import FillingSource
from support.safetensors_files import entry, file_bytes

from headrace.cache.errors import CheckpointError, LoadError
from headrace.loader import load
from headrace.loader.choose import ReadPath
from headrace.loader.memory import available
from headrace.loader.plan import Block
from headrace.loader.readers.reader import FileReader

ENTRIES = [entry("a", "F32", (300_000,)), entry("b", "F32", (300_000,))]
CONTENT = file_bytes(ENTRIES)


def staged(folder: Path) -> FillingSource:
    source = FillingSource(folder, {"model.safetensors": CONTENT}, 1 << 20)
    for number in range(source.files["model.safetensors"].chunks):
        source.files["model.safetensors"].stage(number)
    return source


def when_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act once, just before the first block is filled: headers are read, the mapping is made."""
    once = iter([act])
    fill = FileReader.read

    def read(self: FileReader, block: Block) -> None:
        for one in once:
            one()
        fill(self, block)

    monkeypatch.setattr(FileReader, "read", read)


@pytest.mark.parametrize("read_path", ["mapped", "buffered", "direct", "auto"])
def test_a_file_truncated_during_the_load_is_an_error(
    read_path: ReadPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tmp_path) as source:
        descriptor = source.files["model.safetensors"].fileno()
        when_reading(monkeypatch, lambda: os.ftruncate(descriptor, 100_000))
        with pytest.raises(LoadError, match=r"became shorter|changed while"):
            load(source, read_path=read_path, threads=1)


@pytest.mark.parametrize("read_path", ["mapped", "buffered", "direct", "auto"])
def test_a_file_rewritten_during_the_load_is_an_error(
    read_path: ReadPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tmp_path) as source:
        descriptor = source.files["model.safetensors"].fileno()

        def rewrite() -> None:
            time.sleep(0.02)  # the clock of file times is coarse
            os.pwrite(descriptor, b"x", len(CONTENT) - 1)

        when_reading(monkeypatch, rewrite)
        with pytest.raises(LoadError, match="changed while it was loaded"):
            load(source, read_path=read_path, threads=1)


@pytest.mark.parametrize("read_path", ["mapped", "buffered", "direct", "auto"])
def test_a_file_replaced_by_rename_during_the_load_gives_the_old_bytes(
    read_path: ReadPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected.safetensors"
    expected.write_bytes(CONTENT)
    digest = load(expected).digest()
    with staged(tmp_path) as source:
        other = tmp_path / "other"
        other.write_bytes(b"something else")
        when_reading(monkeypatch, lambda: other.rename(tmp_path / "0.partial"))
        assert load(source, read_path=read_path, threads=1).digest() == digest


@pytest.mark.parametrize("read_path", ["mapped", "buffered", "direct", "auto"])
@pytest.mark.parametrize("length", [0, 5, 8, 100, len(CONTENT) - 1])
def test_a_truncated_file_is_refused_before_anything_is_read(
    read_path: ReadPath, length: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors (is|has)"):
        load(path, read_path=read_path)


def test_memory_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 1 << 32
    head = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with path.open("wb") as file:  # sparse
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    script = (
        "import resource, sys, headrace.loader as l\n"
        "from headrace.cache.errors import LoadError\n"
        f"used = int(open('/proc/self/statm').read().split()[0]) * {resource.getpagesize()}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 31), resource.RLIM_INFINITY))\n"
        "for path in ('buffered', 'mapped'):\n"
        "    try: l.load(sys.argv[1], read_path=path)\n"
        "    except LoadError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    buffered, mapped = answer.stdout.splitlines()
    assert buffered.startswith("not enough memory for the 429496")
    assert "model.safetensors cannot be mapped: Cannot allocate memory" in mapped


def test_the_memory_that_is_available_is_known() -> None:
    free = available()
    assert free is not None
    assert 1 << 20 < free < 1 << 50
