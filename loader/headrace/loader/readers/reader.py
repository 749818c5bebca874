"""The interface of a read path, and what all of them share: tensors as views of images."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import ClassVar

import torch

from headrace.cache.safetensors import collector_paused
from headrace.loader.memory import anonymous
from headrace.loader.plan import Block, FilePlan, Placed
from headrace.loader.source import SourceFile
from headrace.loader.verify import FileCheck, Run
from headrace.loader.views import copied, empty, make_views

_info, _offset = attrgetter("info"), attrgetter("offset")  # for thousands of tensors


class FileReader(ABC):
    """Brings one file's planned bytes in, and gives its tensors.

    `fill` is called from several threads at once, for each block of the plan once, only after the block's
    bytes are ready. `take` gives a tensor when all blocks that it touches are filled. The file belongs to the
    caller, who closes it after `close`.
    """

    span: ClassVar[str]
    """Under what `fill` is counted in the trace."""
    shows: ClassVar[bool] = True
    """Whether `fill` takes any part of a block, and shows a check what it brought in."""
    granularity: ClassVar[int] = 1
    """Blocks must be rounded outward to multiples of this."""
    block_size: int | None = None
    """Bytes of a block, where not `BLOCK`."""
    threads: int | None = None
    """How many are of use to read; None: any number."""

    def __init__(self, file: SourceFile, plan: FilePlan) -> None:
        self.file = file
        self.plan = plan
        self.check: FileCheck | None = None
        """Set before the first `fill` where the file is verified: `fill` then shows it what it brought in."""
        self._images: dict[int, torch.Tensor] = {}
        self._images_lock = threading.Lock()
        self._views_lock = threading.Lock()
        self._views: dict[int, list[torch.Tensor | None]] = {}
        self._arrange(plan)

    def adopt(self, plan: FilePlan) -> None:
        """Take a plan that reads the same bytes to the same places, now that the tensors are known: reading may
        begin before. Not on a device, where places depend on the tensors."""
        assert (plan.segments, plan.images) == (self.plan.segments, self.plan.images)
        self.plan = plan
        self._arrange(plan)

    def _arrange(self, plan: FilePlan) -> None:
        self._members: Mapping[int, Sequence[int]]
        self._position: Sequence[int]  # of each tensor among its image's members; -1: it has no bytes
        self._some_empty = any(info[3] == info[4] for info, _, _ in plan.placed)
        if len(plan.images) == 1 and not self._some_empty:
            self._position = range(len(plan.placed))
            self._members = {0: self._position}
        else:
            self._position, self._members = self._by_image()
        self._untaken = {image: len(members) for image, members in self._members.items()}

    def _by_image(self) -> tuple[list[int], Mapping[int, Sequence[int]]]:
        positions: list[int] = []
        by_image: dict[int, list[int]] = {}
        for number, placed in enumerate(self.plan.placed):
            if placed.info.start == placed.info.stop:
                positions.append(-1)
                continue
            members = by_image.setdefault(self._image_of(placed), [])
            positions.append(len(members))
            members.append(number)
        return positions, by_image

    @property
    @abstractmethod
    def name(self) -> str:
        """What users call the read path that was taken."""

    def outcome(self) -> str:
        """What was done, to be added to the sentence that says why; "" where that says it all."""
        return ""

    def blocks(self) -> list[Block]:
        """All reads, in file order."""
        if self.check is not None and self.shows:
            return [*self.check.runs(self.plan, self.granularity)]
        return list(self.plan.blocks(self.granularity, self.block_size))

    def read(self, block: Block) -> None:
        """Fill one of `blocks`, and verify it where the file is to be verified.

        Raises:
            LoadError: its bytes cannot be read.
            IntegrityError: they do not have their digest.
        """
        if self.check is None:
            self.fill(block)
        elif isinstance(block, Run):
            self.check.fill(self, block)
        else:
            self.check.read_ahead(block)
            self.fill(block)

    @abstractmethod
    def fill(self, block: Block) -> None:
        """Bring a block's bytes in; then call `check.arrived` with all of them, if there is a check, and `shows`.

        Raises:
            LoadError: they cannot be read.
        """

    def _image(self, number: int) -> torch.Tensor:
        """Image `number`, allocated if it is not yet."""
        with self._images_lock:
            image = self._images.get(number)
            if image is None:
                image = self._images[number] = self._allocate(number)
            return image

    def _allocate(self, number: int) -> torch.Tensor:
        """Memory for image `number`: private, where nothing else is said."""
        return anonymous(self.plan.images[number], self.file.path)

    def _release(self, number: int) -> None:
        """All tensors of image `number` were taken: keep no reference to it."""
        with self._images_lock:
            self._images.pop(number, None)

    def _image_of(self, placed: Placed) -> int:
        return placed.image

    def _offsets(self, placed: Iterable[Placed]) -> Iterable[int]:
        """Where in their images tensors lie."""
        return map(_offset, placed)

    def _offset_of(self, placed: Placed) -> int:
        return next(iter(self._offsets([placed])))

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
                view = self._copied(image, placed)
            self._untaken[image] -= 1
            if not self._untaken[image]:
                del self._views[image]
                self._release(image)
        return view

    def take_all(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in file order."""
        placed = self.plan.placed
        result: dict[str, torch.Tensor] = {}
        if self._some_empty:
            result = {one.info.name: self._empty(one) for one in placed if not one.info.nbytes}
        with self._views_lock, collector_paused():
            for image, members in self._members.items():
                for one, view in zip(self._placed(members), self._views_of(image), strict=True):
                    result[one[0][0]] = self._copied(image, one) if view is None else view
                del self._views[image]
                self._release(image)
        if self._some_empty:  # those came first
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
            placed = self._placed(self._members[image])
            items = zip(map(_info, placed), self._offsets(placed), strict=True)
            views = self._views[image] = make_views(self._image(image), items)
        return views

    def _placed(self, numbers: Sequence[int]) -> Sequence[Placed]:
        placed = self.plan.placed
        return placed if len(numbers) == len(placed) else [placed[number] for number in numbers]

    def _copied(self, image: int, placed: Placed) -> torch.Tensor:
        """A tensor of its own, where no view can be made."""
        return copied(self._image(image), (placed.info, self._offset_of(placed)))

    def _empty(self, placed: Placed) -> torch.Tensor:
        return empty(placed.info)
