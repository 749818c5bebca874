"""The buffered read path: read(2) into private memory made of huge pages.

Reading through the page cache with large reads into huge pages needs no conversion and, once loaded, nothing
from the file: it may change or vanish. The tensors are views of the images.
"""

from __future__ import annotations

import threading
from typing import ClassVar

import torch

from headrace.loader.memory import anonymous, as_bytes
from headrace.loader.plan import Block, FilePlan
from headrace.loader.readers.reader import FileReader, read_into
from headrace.loader.source import SourceFile


class BufferedReader(FileReader):
    """Views of private memory, allocated image by image when its first block is filled."""

    name: ClassVar[str] = "buffered"
    span: ClassVar[str] = "read"

    def __init__(self, file: SourceFile, plan: FilePlan) -> None:
        super().__init__(file, plan)
        self._images: dict[int, torch.Tensor] = {}
        self._images_lock = threading.Lock()

    def fill(self, block: Block) -> None:
        segment = self.plan.segments[block.segment]
        image = self._image(segment.image)
        begin = segment.offset + block.start - segment.start
        read_into(self.file, as_bytes(image[begin : begin + block.stop - block.start]), block.start)

    def _image(self, number: int) -> torch.Tensor:
        with self._images_lock:
            image = self._images.get(number)
            if image is None:
                image = self._images[number] = anonymous(self.plan.images[number], self.file.path)
            return image

    def _release(self, number: int) -> None:
        with self._images_lock:
            self._images.pop(number, None)
