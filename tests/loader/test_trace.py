"""What the trace says of where the time went."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support.safetensors_files import entry, file_bytes

from headrace.loader import load
from headrace.loader.choose import ReadPath
from headrace.loader.plan import BLOCK, Block
from headrace.loader.readers.mapped import MappedReader
from headrace.loader.trace import Trace
from headrace.loader.transfer import Transfer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_time_outside_is_when_no_thread_brings_bytes_in(clock: list[float]) -> None:
    trace = Trace()
    clock[0] = 1
    with trace.span("read"):
        clock[0] = 2
        with trace.span("header"):  # in another thread, say
            clock[0] = 4
        with trace.span("populate"):
            clock[0] = 5
        assert trace.outside() == 1
    clock[0] = 7
    with trace.span("place"):
        clock[0] = 8
    assert trace.outside() == 4
    spans = {span.name: (span.start, span.seconds, span.count) for span in trace.spans()}
    assert spans == {"read": (1, 4, 1), "header": (2, 2, 1), "populate": (4, 1, 1), "place": (7, 1, 1)}


def test_a_load_says_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_bytes([entry("a", "U8", (100_000,))]))
    stats = load(tmp_path).stats
    assert 0 < stats.outside < stats.seconds


def test_what_is_in_the_page_cache_is_mapped_in_larger_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes([entry("a", "U8", (3 * BLOCK,))]))
    filled: list[int] = []
    fill = MappedReader.fill

    def noting(self: MappedReader, block: Block) -> None:
        filled.append(block.stop - block.start)
        fill(self, block)

    monkeypatch.setattr(MappedReader, "fill", noting)
    load(tmp_path, read_path="mapped")
    assert sum(filled) >= 3 * BLOCK
    assert len(filled) == 1


@pytest.mark.parametrize(("read_path", "started"), [("mapped", 2), ("buffered", 2), ("direct", 5)])
def test_only_as_many_threads_read_as_are_of_use(
    read_path: ReadPath, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_bytes([entry("a", "U8", (100_000,))]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    workers: list[str] = []
    work = Transfer.work

    def noting(self: Transfer) -> None:
        workers.append(threading.current_thread().name)
        work(self)

    monkeypatch.setattr(Transfer, "work", noting)
    load(tmp_path, read_path=read_path, threads=5)
    assert len(workers) == started
