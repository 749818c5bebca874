"""What to load: from headers and a selection to byte ranges, in file order.

A file's selected tensors become *segments*, ranges that are read without a gap; near neighbours are joined,
reading a bounded number of bytes that nobody asked for. Segments are packed into *images*, pieces of memory
of which the tensors are views. For a whole file that is one segment in one image.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from headrace.cache.errors import MissingTensor
from headrace.cache.safetensors import Header, TensorInfo
from headrace.loader.checkpoint import name_list

BLOCK = 8 * 1024 * 1024
"""Bytes of one read; blocks of a file start at multiples of it."""

PAGE = 4096
"""Segments lie in an image as in the file modulo this, so that direct reads remain possible."""

MAX_GAP = 64 * 1024
"""Segments this near are joined: a read of so many bytes costs no more than another call."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors: all of them, or those named, or those that match a glob pattern (case matters)."""

    names: frozenset[str] | None = None
    patterns: tuple[str, ...] = ()

    @staticmethod
    def of(names: Iterable[str] | None = None, patterns: Iterable[str] | None = None) -> Selection:
        """Neither given: everything. Both: what either takes. A bare text counts as one."""
        if names is None and patterns is None:
            return Selection()
        names = (names,) if isinstance(names, str) else names or ()
        patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
        return Selection(frozenset(names), tuple(patterns))

    @property
    def everything(self) -> bool:
        return self.names is None

    def describe(self) -> str:
        """The same for the same selection; in words, where they are few."""
        if self.names is None:
            return "everything"
        said = ", ".join([*sorted(self.names), *self.patterns])
        if len(said) > 60:
            said = f"{said[:40]}... ({xxhash.xxh3_64_hexdigest(said.encode())})"
        return f"{len(self.names)} names and {len(self.patterns)} patterns: {said}"

    def takes(self, name: str) -> bool:
        if self.names is None or name in self.names:
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def of_header(self, header: Header) -> list[TensorInfo]:
        """The selected tensors of a file, in file order."""
        infos = header.tensors.values()
        return list(infos) if self.everything else [info for info in infos if self.takes(info.name)]

    def check(self, present: Iterable[str], where: str) -> None:
        """Compare with all names of a checkpoint.

        Raises:
            MissingTensor: a name that is not there, or a pattern that matches nothing.
        """
        if self.names is None:
            return
        present = set(present)
        missing = sorted(self.names - present)
        missing += [pattern for pattern in self.patterns if not fnmatch.filter(present, pattern)]
        if missing:
            raise MissingTensor(
                f"{where} has no tensor {name_list(missing)}: check the names", tuple(missing)
            )


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes [start, stop) of the file, to lie at byte `offset` of image number `image`."""

    start: int
    stop: int
    image: int
    offset: int


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [start, stop) of the file that are read at once, and to which segment they belong."""

    start: int
    stop: int
    segment: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What to read of one file.

    Attributes:
        path: the file, relative to its model.
        header: of the file.
        infos: the selected tensors in file order, empty ones included.
        image_of: the number of the image in which each of them will lie. (Columns, not an object for each tensor:
            there may be tens of thousands.)
        offset_of: at which of its bytes. (Neither says anything of an empty tensor.)
        segments: in file order, disjoint.
        images: size of each image in bytes.
    """

    path: str
    header: Header
    infos: Sequence[TensorInfo]
    image_of: Sequence[int]
    offset_of: Sequence[int]
    segments: tuple[Segment, ...]
    images: tuple[int, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the selected tensors."""
        return sum(info.nbytes for info in self.infos)

    @property
    def read_bytes(self) -> int:
        """Bytes read: the selected tensors and the gaps read over."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def wanted(self) -> Iterator[tuple[int, int]]:
        """Where in the file the bytes lie that were asked for, in file order: without the gaps read over."""
        if self.read_bytes == self.tensor_bytes:
            return ((segment.start, segment.stop) for segment in self.segments)
        base = self.header.data_start
        return ((base + info.start, base + info.stop) for info in self.infos if info.start < info.stop)

    def blocks(self, granularity: int = 1, size: int | None = None) -> Iterator[Block]:
        """The reads, in file order, at most `size` bytes long (plus rounding).

        Args:
            size: by default `BLOCK`.
            granularity: starts and stops are rounded outward to multiples of it (a power of two), within
                the file: for pages, which can only be brought in whole.
        """
        size = size or BLOCK
        end = self.header.file_size
        for number, segment in enumerate(self.segments):
            start = segment.start
            while start < segment.stop:
                stop = min(segment.stop, (start // size + 1) * size)
                yield Block(start & -granularity, min(end, -(-stop // granularity) * granularity), number)
                start = stop

    def brought_by(self, blocks: Sequence[Block]) -> Iterator[tuple[int, Block]]:
        """(index in `infos`, block) for each block that brings bytes of the tensor; `blocks` in file order."""
        first = 0
        data_start = self.header.data_start
        for number, info in enumerate(self.infos):
            start, stop = data_start + info.start, data_start + info.stop
            if start == stop:
                continue
            while blocks[first].stop <= start:
                first += 1
            index = first
            while index < len(blocks) and blocks[index].start < stop:
                yield number, blocks[index]
                index += 1


def plan_file(path: str, header: Header, selection: Selection, *, max_image: int | None = None) -> FilePlan:
    """Plan the reading of one file.

    Args:
        path: the file, relative to its model.
        header: of the file.
        selection: which tensors.
        max_image: images get no larger than this many bytes (a larger tensor has one of its own), so that
            memory is returned piece by piece as tensors are dropped; None: one image for the file.
    """
    if selection.everything and max_image is None:
        return plan_whole(path, header)
    chosen = selection.of_header(header)
    # Read over at most an eighth more than was asked for, in all.
    spare = max(1024 * 1024, sum(info.nbytes for info in chosen) // 8)
    return plan_ranges(path, header, chosen, spare=spare, max_image=max_image)


def plan_whole(path: str, header: Header) -> FilePlan:
    """All of a file, which its tensors cover without holes, in one image.

    What is read, and to where, does not depend on the tensors: a header without them will do at first.
    """
    start, stop = header.data_start, header.file_size
    shift = start % PAGE
    infos = tuple(header.tensors.values())
    zeros = bytes(len(infos))
    if start == stop:
        return FilePlan(path, header, infos, zeros, zeros, (), ())
    offsets = [shift + info[3] for info in infos]
    segment, size = Segment(start, stop, 0, shift), shift + stop - start
    return FilePlan(path, header, infos, zeros, offsets, (segment,), (size,))


def plan_ranges(
    path: str, header: Header, chosen: Sequence[TensorInfo], *, spare: int, max_image: int | None = None
) -> FilePlan:
    """Plan the reading of ranges of one file, each of which becomes a tensor.

    Args:
        path, header, max_image: as `plan_file`.
        chosen: in file order, not overlapping.
        spare: in all, not more bytes than this are read that nobody asked for.
    """
    segments: list[Segment] = []
    images: list[int] = []
    homes: list[Segment] = []  # of each tensor that has bytes
    for start, stop, count in _runs(chosen, header.data_start, max_image, spare):
        used = -(-images[-1] // PAGE) * PAGE if images else 0
        offset = used + start % PAGE
        if not images or (max_image is not None and offset + stop - start > max_image):
            images.append(0)
            offset = start % PAGE
        images[-1] = offset + stop - start
        segments.append(Segment(start, stop, len(images) - 1, offset))
        homes += [segments[-1]] * count
    image_of, offset_of = [0] * len(chosen), [0] * len(chosen)
    remaining = iter(homes)
    for number, info in enumerate(chosen):
        if info.start != info.stop:
            home = next(remaining)
            image_of[number] = home.image
            offset_of[number] = home.offset + header.data_start + info.start - home.start
    return FilePlan(path, header, tuple(chosen), image_of, offset_of, tuple(segments), tuple(images))


def _runs(
    chosen: Sequence[TensorInfo], data_start: int, max_run: int | None, spare: int
) -> Iterator[tuple[int, int, int]]:
    """Join neighbours: (start, stop, number of tensors), offsets in the file. Empty tensors do not count."""
    start = stop = count = 0
    for info in chosen:
        if not info.nbytes:
            continue
        gap = data_start + info.start - stop
        fits = max_run is None or data_start + info.stop - start <= max_run
        if count and gap <= min(MAX_GAP, spare) and fits:
            spare -= gap
        else:
            if count:
                yield start, stop, count
            start, count = data_start + info.start, 0
        count += 1
        stop = data_start + info.stop
    if count:
        yield start, stop, count
