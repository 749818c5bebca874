"""The mapped read path: the tensors are views of the file itself, nothing is copied.

The pages are brought in with MADV_POPULATE_READ once their bytes are ready, so that a file that became
shorter is an error here and not the end of the process. The mapping is private: a program that writes to a
tensor gets its own copy of the page. Blocks are whole pages, because such a copy would otherwise keep the
bytes of a neighbour that was not yet staged.

Once tensors are handed out, the kernel may take their pages back and read them again from the file. A file
of a store never changes; if any other file is truncated while it is in use this way, touching the lost pages
kills the process (SIGBUS). The buffered read path is proof against that.
"""

from __future__ import annotations

import mmap
import resource
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from headrace.loader.memory import as_bytes, ask_for, cores, map_file, populate, resident
from headrace.loader.pace import Pace
from headrace.loader.plan import Block, FilePlan
from headrace.loader.readers.fetch import read_into
from headrace.loader.readers.reader import FileReader, picked
from headrace.loader.source import SourceFile
from headrace.loader.verify import FileCheck
from headrace.loader.views import shaped

_PRESENT_BLOCK = 64 * 1024 * 1024
"""Bytes that are brought in at once where all are in the page cache: that takes so little time that with `BLOCK` the
threads would mostly wait for each other, and for the interpreter."""
_PIECE = 256 * 1024  # stays in the CPU's cache between reading and hashing


class MappedReader(FileReader):
    """Views of the mapped file; one image, in which everything lies as in the file."""

    span: ClassVar[str] = "populate"
    granularity: ClassVar[int] = mmap.PAGESIZE

    def __init__(self, file: SourceFile, plan: FilePlan, *, absent: Pace | None = None) -> None:
        """
        Args:
            absent: given where some of it is not in the page cache, and has to be read: is told how fast.
        """
        super().__init__(file, plan)
        self._absent = absent
        self._ask = absent is not None
        if file.complete and absent is None:
            self.block_size = _PRESENT_BLOCK
            self.threads = cores()  # nothing is waited for
        mapping = map_file(file.fileno(), file.size, file.path)
        self._mapping: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    @property
    def name(self) -> str:
        return "mapped"

    def fill(self, block: Block) -> None:
        began = time.perf_counter()
        fetched = self._ask and self._ask_for(block)
        before = _major_faults()
        populate(self._image(0), block.start, block.stop, self.file.path)
        if not self._ask and _major_faults() != before:
            self._ask = True  # what was looked at was in the page cache, not so what lies between
        if fetched and self._absent is not None:
            self._absent.record("mapped", block.stop - block.start, time.perf_counter() - began)
        if self.check is not None:
            self._show(self.check, block)

    def _ask_for(self, block: Block) -> bool:
        """Have the kernel read what is not there: a page fault would bring in a page or a few, but what is asked
        for in advance comes in large pieces. Whether that is all of the block."""
        part = resident(self.file.fileno(), block.start, block.stop)
        if part == 1.0:
            return False
        ask_for(self.file.fileno(), block.start, block.stop)
        return part == 0.0

    def _show(self, check: FileCheck, block: Block) -> None:
        # Read from the same pages: touching them would kill the process if the file became shorter just now.
        piece = memoryview(bytearray(min(_PIECE, block.stop - block.start)))
        for start in range(block.start, block.stop, len(piece)):
            part = piece[: min(len(piece), block.stop - start)]
            read_into(self.file, part, start)
            check.arrived(start, part)

    def _image(self, number: int) -> torch.Tensor:
        assert self._mapping is not None  # nothing is filled or taken after close
        return self._mapping

    def _copied(self, image: int, number: int) -> torch.Tensor:
        # Read, not copied out of the mapping, for the same reason.
        info = self.plan.infos[number]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        read_into(self.file, as_bytes(raw), self._offset(number))
        return shaped(raw, info)

    def _release(self, number: int) -> None:
        self._mapping = None

    def _image_of(self, number: int) -> int:
        return 0

    def _offsets(self, numbers: Sequence[int]) -> Iterable[int]:
        base = self.plan.header.data_start
        return [base + info[3] for info in picked(self.plan.infos, numbers)]


def _major_faults() -> int:
    """How often this thread has waited for a page that had to be read."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
