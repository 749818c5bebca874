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
from typing import ClassVar

import torch

from headrace.loader.memory import map_file, populate
from headrace.loader.plan import Block, FilePlan, Placed
from headrace.loader.readers.reader import FileReader
from headrace.loader.source import SourceFile


class MappedReader(FileReader):
    """Views of the mapped file; one image, in which everything lies as in the file."""

    name: ClassVar[str] = "mapped"
    span: ClassVar[str] = "populate"
    granularity: ClassVar[int] = mmap.PAGESIZE

    def __init__(self, file: SourceFile, plan: FilePlan) -> None:
        super().__init__(file, plan)
        mapping = map_file(file.fileno(), file.size, file.path)
        self._mapping: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    def fill(self, block: Block) -> None:
        populate(self._image(0), block.start, block.stop, self.file.path)

    def _image(self, number: int) -> torch.Tensor:
        assert self._mapping is not None  # nothing is filled or taken after close
        return self._mapping

    def _release(self, number: int) -> None:
        self._mapping = None

    def _image_of(self, placed: Placed) -> int:
        return 0

    def _offset_of(self, placed: Placed) -> int:
        return self.plan.header.data_start + placed.info.start
