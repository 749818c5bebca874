"""The interface of a read path, and what all of them share: tensors as views of images."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from headrace.cache.errors import LoadError
from headrace.cache.safetensors import collector_paused
from headrace.loader.plan import Block, FilePlan, Placed
from headrace.loader.source import SourceFile
from headrace.loader.views import copied, empty, make_views


class FileReader(ABC):
    """Brings one file's planned bytes in, and gives its tensors.

    `fill` is called from several threads at once, for each block of the plan once, only after the block's
    bytes are ready. `take` gives a tensor when all blocks that it touches are filled. The file belongs to the
    caller, who closes it after `close`.
    """

    name: ClassVar[str]
    """What users call this read path."""
    span: ClassVar[str]
    """Under what `fill` is counted in the trace."""
    granularity: ClassVar[int] = 1
    """Blocks must be rounded outward to multiples of this."""

    def __init__(self, file: SourceFile, plan: FilePlan) -> None:
        self.file = file
        self.plan = plan
        self._views_lock = threading.Lock()
        self._views: dict[int, list[torch.Tensor | None]] = {}
        self._members: dict[int, list[int]] = {}
        self._position: list[int] = []  # of each tensor among its image's members
        for number, placed in enumerate(plan.placed):
            if placed.info.start == placed.info.stop:
                self._position.append(-1)
                continue
            members = self._members.setdefault(self._image_of(placed), [])
            self._position.append(len(members))
            members.append(number)
        self._untaken = {image: len(members) for image, members in self._members.items()}

    @abstractmethod
    def fill(self, block: Block) -> None:
        """Bring a block's bytes in.

        Raises:
            LoadError: they cannot be read.
        """

    @abstractmethod
    def _image(self, number: int) -> torch.Tensor:
        """Image `number`, allocated if it is not yet."""

    @abstractmethod
    def _release(self, number: int) -> None:
        """All tensors of image `number` were taken: keep no reference to it."""

    def _image_of(self, placed: Placed) -> int:
        return placed.image

    def _offset_of(self, placed: Placed) -> int:
        return placed.offset

    def prepare(self) -> None:
        """Make all views now. They may be made before their bytes are there: then it costs no time later."""
        with self._views_lock, collector_paused():
            for image in self._members:
                self._views_of(image)

    def take(self, number: int) -> torch.Tensor:
        """The tensor `plan.placed[number]`; each may be taken once."""
        placed = self.plan.placed[number]
        if not placed.info.nbytes:
            return self._empty(placed)
        image = self._image_of(placed)
        with self._views_lock:
            view = self._views_of(image)[self._position[number]]
            if view is None:
                view = copied(self._image(image), (placed.info, self._offset_of(placed)))
            self._untaken[image] -= 1
            if not self._untaken[image]:
                del self._views[image]
                self._release(image)
        return view

    def take_all(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in file order."""
        placed = self.plan.placed
        result = {one.info.name: self._empty(one) for one in placed if not one.info.nbytes}
        with self._views_lock, collector_paused():
            for image, members in self._members.items():
                for number, view in zip(members, self._views_of(image), strict=True):
                    one = placed[number]
                    if view is None:
                        view = copied(self._image(image), (one.info, self._offset_of(one)))
                    result[one.info.name] = view
                del self._views[image]
                self._release(image)
        if -1 in self._position:  # those without bytes came first
            return {one.info.name: result[one.info.name] for one in placed}
        return result

    def close(self) -> None:
        """Let go of all images. Tensors that were taken stay good."""
        with self._views_lock:
            self._views.clear()
            for image in self._members:
                self._release(image)

    def _views_of(self, image: int) -> list[torch.Tensor | None]:
        views = self._views.get(image)
        if views is None:
            placed = self.plan.placed
            items = [
                (placed[number].info, self._offset_of(placed[number])) for number in self._members[image]
            ]
            views = self._views[image] = make_views(self._image(image), items)
        return views

    def _empty(self, placed: Placed) -> torch.Tensor:
        return empty(placed.info)


def read_into(file: SourceFile, memory: memoryview, start: int) -> None:
    """Read `len(memory)` bytes from offset `start` of a file.

    Raises:
        LoadError: the file is shorter than it said, or cannot be read.
    """
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file.fileno(), [memory[done:]], start + done)
        except OSError as error:
            raise LoadError(
                f"{file.path} cannot be read at byte {start + done}: {error.strerror or error}"
            ) from error
        if not count:
            raise LoadError(
                f"{file.path} became shorter than its {file.size} bytes while it was loaded: "
                "stage or download it again"
            )
        done += count
