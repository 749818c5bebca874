"""What of a tensor's bytes a slice takes, and how the slice looks.

Cutting along one dimension takes, of every row that this dimension forms, the same *teeth*. Along the first
dimension there is one row: one tooth is one range of the file, as if it were a tensor of its own. Anything
else is a comb: many short ranges, which are gathered into one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from headrace.cache.errors import UsageError
from headrace.cache.safetensors import DTYPE_BITS, TensorInfo

Span = tuple[int, int]
"""[start, stop) along a dimension, in elements."""


class Comb(NamedTuple):
    """The same teeth in each of several rows.

    Attributes:
        start: where the first row begins, in bytes from the data section.
        rows: how many.
        pitch: bytes from one row to the next.
        teeth: what is taken of a row, in order and apart: (offset in the row, width), in bytes.
    """

    start: int
    rows: int
    pitch: int
    teeth: tuple[tuple[int, int], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes taken of each row."""
        return sum(width for _, width in self.teeth)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def locate(self, position: int) -> int:
        """Where byte `position` of the slice lies, in bytes from the data section."""
        row, rest = divmod(position, self.row_bytes)
        for offset, width in self.teeth:
            if rest < width:
                return self.start + row * self.pitch + offset + rest
            rest -= width
        raise AssertionError("a remainder is less than what it is divided by")

    def pieces(self, first: int, last: int) -> Iterator[Span]:
        """The ranges that hold bytes [first, last) of the slice, in order, in bytes from the data section."""
        row_bytes = self.row_bytes
        if not (first % row_bytes or last % row_bytes):  # the same, faster: there may be thousands
            for row in range(first // row_bytes, last // row_bytes):
                start = self.start + row * self.pitch
                for offset, width in self.teeth:
                    yield start + offset, start + offset + width
            return
        for row in range(first // row_bytes, -(-last // row_bytes)):
            done = row * row_bytes
            for offset, width in self.teeth:
                begin, end = max(first, done), min(last, done + width)
                if begin < end:
                    at = self.start + row * self.pitch + offset + begin - done
                    yield at, at + end - begin
                done += width


class Cut(NamedTuple):
    """One tensor's slice.

    Attributes:
        info: of the slice. `start` is where its first byte lies; it ends at `stop` if it is one range.
        comb: how it lies in the file if it is not one range.
    """

    info: TensorInfo
    comb: Comb | None = None

    def ranges(self) -> Iterator[Span]:
        """The bytes that are needed, in order, from the data section."""
        if self.comb is not None:
            yield from self.comb.pieces(0, self.comb.nbytes)
        elif self.info.nbytes:
            yield self.info.start, self.info.stop


def cut(info: TensorInfo, dim: int, spans: Iterable[Span]) -> Cut:
    """Take `spans` (in order, apart, within the shape) along dimension `dim` (not negative).

    Raises:
        UsageError: an edge lies inside a byte, as may happen with 4- and 6-bit elements.
    """
    spans = _joined(spans)
    size = info.shape[dim]
    taken = sum(stop - start for start, stop in spans)
    if taken == size:
        return Cut(info)
    shape = (*info.shape[:dim], taken, *info.shape[dim + 1 :])
    rows = math.prod(info.shape[:dim])
    bits = math.prod(info.shape[dim + 1 :]) * DTYPE_BITS[info.dtype]
    if not taken or not info.nbytes:
        return Cut(TensorInfo(info.name, info.dtype, shape, info.start, info.start))
    if (rows > 1 and size * bits % 8) or any(edge * bits % 8 for span in spans for edge in span):
        raise UsageError(
            f"tensor {info.name!r} cannot be cut along dimension {dim}: elements of {info.dtype} have "
            f"{DTYPE_BITS[info.dtype]} bits, and the cut would go through a byte; use fewer ranks, or replicate it"
        )
    teeth = tuple((start * bits // 8, (stop - start) * bits // 8) for start, stop in spans)
    comb = Comb(info.start, rows, size * bits // 8, teeth)
    start = info.start + teeth[0][0]
    result = TensorInfo(info.name, info.dtype, shape, start, start + comb.nbytes)
    return Cut(result, None if rows == 1 and len(teeth) == 1 else comb)


def _joined(spans: Iterable[Span]) -> list[Span]:
    result: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result
