"""The interface of a read path, and what all of them share: tensors as views of images."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import ClassVar, TypeVar, cast

import torch

from headrace.cache.safetensors import TensorInfo, collector_paused
from headrace.loader.memory import anonymous
from headrace.loader.plan import Block, FilePlan
from headrace.loader.source import SourceFile
from headrace.loader.verify import FileCheck, Run
from headrace.loader.views import copied, empty, make_views

_T = TypeVar("_T")
_name = itemgetter(0)  # of a TensorInfo


def picked(column: Sequence[_T], numbers: Sequence[int]) -> Sequence[_T]:
    """What a column says of some tensors; `numbers` ascend, so as many as there are, are all."""
    return column if len(numbers) == len(column) else [column[number] for number in numbers]


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
        self._some_empty = any(info[3] == info[4] for info in plan.infos)
        if len(plan.images) == 1 and not self._some_empty:
            self._position = range(len(plan.infos))
            self._members = {0: self._position}
        else:
            self._position, self._members = self._by_image()
        self._untaken = {image: len(members) for image, members in self._members.items()}

    def _by_image(self) -> tuple[list[int], Mapping[int, Sequence[int]]]:
        positions: list[int] = []
        by_image: dict[int, list[int]] = {}
        for number, info in enumerate(self.plan.infos):
            if info.start == info.stop:
                positions.append(-1)
                continue
            members = by_image.setdefault(self._image_of(number), [])
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

    def _image_of(self, number: int) -> int:
        return self.plan.image_of[number]

    def _offsets(self, numbers: Sequence[int]) -> Iterable[int]:
        """Where in their images tensors lie."""
        return picked(self.plan.offset_of, numbers)

    def _offset(self, number: int) -> int:
        return next(iter(self._offsets([number])))

    def prepare(self) -> None:
        """Make all views now. They may be made before their bytes are there: then it costs no time later."""
        with self._views_lock, collector_paused():
            for image in self._members:
                self._views_of(image)

    def take(self, number: int) -> torch.Tensor:
        """The tensor `plan.infos[number]`; each may be taken once."""
        info = self.plan.infos[number]
        if not info.nbytes:
            return self._empty(info)
        image = self._image_of(number)
        with self._views_lock:
            view = self._views_of(image)[self._position[number]]
            if view is None:
                view = self._copied(image, number)
            self._untaken[image] -= 1
            if not self._untaken[image]:
                del self._views[image]
                self._release(image)
        return view

    def take_all(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in file order."""
        infos = self.plan.infos
        result: dict[str, torch.Tensor] = {}
        if self._some_empty:
            result = {info.name: self._empty(info) for info in infos if not info.nbytes}
        with self._views_lock, collector_paused():
            for image, members in self._members.items():
                views = self._views_of(image)
                for position in [position for position, view in enumerate(views) if view is None]:
                    views[position] = self._copied(image, members[position])
                complete = cast("list[torch.Tensor]", views)
                result.update(zip(map(_name, picked(infos, members)), complete, strict=True))
                del self._views[image]
                self._release(image)
        if self._some_empty:  # those came first
            return {info.name: result[info.name] for info in infos}
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
            members = self._members[image]
            items = zip(picked(self.plan.infos, members), self._offsets(members), strict=True)
            views = self._views[image] = make_views(self._image(image), items)
        return views

    def _copied(self, image: int, number: int) -> torch.Tensor:
        """A tensor of its own, where no view can be made."""
        return copied(self._image(image), (self.plan.infos[number], self._offset(number)))

    def _empty(self, info: TensorInfo) -> torch.Tensor:
        return empty(info)
