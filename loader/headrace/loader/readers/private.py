"""Private memory made of huge pages, into which a `Fetch` brings the bytes.

Large reads into huge pages need no conversion and, once loaded, nothing from the file: it may change or
vanish. The tensors are views of the images.
"""

from __future__ import annotations

from typing import ClassVar

from headrace.loader.memory import cores, whole_pages
from headrace.loader.plan import PAGE, Block, FilePlan
from headrace.loader.readers.fetch import Fetch
from headrace.loader.readers.reader import FileReader
from headrace.loader.source import SourceFile


class PrivateReader(FileReader):
    """Views of private memory, allocated image by image when its first block is filled."""

    span: ClassVar[str] = "read"

    def __init__(self, file: SourceFile, plan: FilePlan, fetch: Fetch, *, copies: bool = False) -> None:
        """
        Args:
            copies: all of it is in the page cache, so that more threads than cores would only hinder each other.
        """
        super().__init__(file, plan)
        self._fetch = fetch
        if copies:
            self.threads = cores()

    @property
    def name(self) -> str:
        return self._fetch.name

    def outcome(self) -> str:
        return self._fetch.outcome()

    def fill(self, block: Block) -> None:
        # Segments begin on pages of their own and blocks end on pages, so the pages are this block's alone.
        segment = self.plan.segments[block.segment]
        image = self._image(segment.image)
        begin = segment.offset + block.start - segment.start
        pages = whole_pages(image, begin, begin + block.stop - block.start)
        self._fetch.bring(pages, block.start, block.stop)
        if self.check is not None:
            first = block.start % PAGE
            self.check.arrived(block.start, pages[first : first + block.stop - block.start])

    def close(self) -> None:
        super().close()
        self._fetch.close()
