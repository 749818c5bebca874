"""Planning what one rank reads of a file: whole ranges as ever, and short ranges that are gathered.

A slice of rows is one range and is read, or mapped, like a tensor. A slice of columns, or of each part of a
fused tensor, is a comb of ranges, brought together in memory of its own. How depends on the comb:

* teeth of 64 KiB and more are read one by one;
* of narrower ones that lie a page apart or more, only the teeth are read, many at once;
* where they are nearer than a page, the disk and the page cache have no smaller unit: rows are read whole,
  some at a time, and the teeth copied out.

So a rank reads what it needs, at most 1/64 more for neighbours that are joined (or 1 MiB a file, if that is
more), and less than a page for each tooth of the narrowest combs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.cache.safetensors import Header
from headrace.loader.cuts import Comb, Cut
from headrace.loader.plan import BLOCK, PAGE, Block, FilePlan, Segment, Selection, plan_ranges
from headrace.loader.slices import SlicePlan

WIDE = 64 * 1024
"""Bytes of a tooth that is worth a call of its own."""

SCRATCH = 1024 * 1024
"""Bytes of rows that are read whole at once."""

MAX_SPAN = 4 * BLOCK
"""A block's bytes lie no farther apart in the file (unless one row does), so that what is being staged can be
gathered before all of a large tensor is there."""

_ALIGNMENT = 64  # of tensors in an image


class Way(enum.Enum):
    """How a comb is gathered."""

    TOOTH_BY_TOOTH = enum.auto()
    MANY_TEETH = enum.auto()
    WHOLE_ROWS = enum.auto()


@dataclass(frozen=True, slots=True)
class GatherBlock(Block):
    """Bytes [first, last) of the slice `segment` stands for; what they are gathered from lies in
    [start, stop) of the file, not all of which is read."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class GatherPlan(FilePlan):
    """As `FilePlan`, for slices that are combs. Segment i is where comb i lies: its extent in the file, and its
    place in an image.

    Attributes:
        combs: in file order.
        ways: of each comb.
    """

    combs: tuple[Comb, ...]
    ways: tuple[Way, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read, at most."""
        total = 0
        for comb, way, segment in zip(self.combs, self.ways, self.segments, strict=True):
            total += segment.stop - segment.start if way is Way.WHOLE_ROWS else comb.nbytes
        return total

    def blocks(self, granularity: int = 1, size: int | None = None) -> Iterator[GatherBlock]:
        """What is gathered at once: at most `size` bytes, whole rows of the comb where they are shorter."""
        size = size or BLOCK
        for number, comb in enumerate(self.combs):
            step = size
            if comb.row_bytes <= size:
                step = max(1, min(size // comb.row_bytes, MAX_SPAN // comb.pitch)) * comb.row_bytes
            for first in range(0, comb.nbytes, step):
                last = min(first + step, comb.nbytes)
                start = self.header.data_start + comb.locate(first)
                stop = self.header.data_start + comb.locate(last - 1) + 1
                yield GatherBlock(start, stop, number, first, last)

    def brought_by(self, blocks: Sequence[Block]) -> Iterator[tuple[int, Block]]:
        """(index in `infos`, block): a block belongs to one tensor."""
        for block in blocks:
            yield block.segment, block


def way_of(comb: Comb) -> Way:
    """See the module's docstring."""
    row_bytes, teeth = comb.row_bytes, len(comb.teeth)
    if row_bytes // teeth >= WIDE:
        return Way.TOOTH_BY_TOOTH
    if comb.pitch - row_bytes < PAGE * teeth and comb.pitch <= SCRATCH:
        return Way.WHOLE_ROWS
    return Way.MANY_TEETH if row_bytes <= BLOCK else Way.TOOTH_BY_TOOTH


def plan_slices(
    path: str, header: Header, selection: Selection, slices: SlicePlan, *, max_image: int | None = None
) -> tuple[FilePlan, GatherPlan]:
    """Plan what one rank reads of one file: the ranges, and what is gathered; either may be nothing.

    Args:
        path, header, selection, max_image: as `plan_file`.
        slices: what the rank needs of each tensor.

    Raises:
        UsageError: a tensor cannot be sliced as its rule says.
    """
    cuts = [cut for info in selection.of_header(header) if (cut := slices.cut(info)) is not None]
    spare = max(1024 * 1024, sum(cut.info.nbytes for cut in cuts) // 64)
    ranges = [cut.info for cut in cuts if cut.comb is None]
    return (
        plan_ranges(path, header, ranges, spare=spare, max_image=max_image),
        _gather([cut for cut in cuts if cut.comb is not None], path, header, max_image),
    )


def _gather(cuts: list[Cut], path: str, header: Header, max_image: int | None) -> GatherPlan:
    segments: list[Segment] = []
    combs: list[Comb] = []
    images: list[int] = []
    for _, comb in cuts:
        assert comb is not None
        offset = -(-images[-1] // _ALIGNMENT) * _ALIGNMENT if images else 0
        if not images or (max_image is not None and offset + comb.nbytes > max_image):
            images.append(0)
            offset = 0
        images[-1] = offset + comb.nbytes
        start = header.data_start + comb.locate(0)
        stop = header.data_start + comb.locate(comb.nbytes - 1) + 1
        segments.append(Segment(start, stop, len(images) - 1, offset))
        combs.append(comb)
    return GatherPlan(
        path,
        header,
        tuple(info for info, _ in cuts),
        [segment.image for segment in segments],
        [segment.offset for segment in segments],
        tuple(segments),
        tuple(images),
        tuple(combs),
        tuple(way_of(comb) for comb in combs),
    )
