"""Chunk geometry: the lengths into which a file is cut.

For safetensors the grid follows the content, so that a longer header or one more tensor does not
shift the chunks of a new revision: the header is a chunk of its own, a tensor of at least a sixteenth
of the chunk size starts (and ends) its own chunks, and smaller ones are packed together, whole.
Why, with figures: docs/decisions/0002-chunk-geometry.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from headrace.cache.digest import identity
from headrace.cache.errors import ManifestError, UsageError

MIB = 1 << 20
DEFAULT_CHUNK = 16 * MIB
MIN_CHUNK = 64 * 1024
MAX_CHUNK = 256 * MIB
MAX_CHUNKS = 1 << 24
# A tensor of at least this part of the chunk size stands alone.
ALONE = 16


@dataclass(frozen=True)
class Grid:
    """The chunk lengths of a file, in bytes, in order; () for an empty file."""

    lengths: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each chunk starts, and the file size at the end: count + 1 entries."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def size(self) -> int:
        return self.offsets[-1]

    def __len__(self) -> int:
        return len(self.lengths)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The byte range of the chunks [first, last)."""
        return self.offsets[first], self.offsets[last]

    def covering(self, start: int, stop: int) -> tuple[int, int]:
        """The chunks [first, last) that hold the bytes [start, stop)."""
        if start >= stop:
            return 0, 0
        return bisect_right(self.offsets, start) - 1, bisect_right(self.offsets, stop - 1)

    @cached_property
    def identity(self) -> str:
        return identity("grid", *(f"{length}x{times}" for length, times in self.runs()))

    def runs(self) -> list[list[int]]:
        """Run-length form for JSON: [[length, times], ...]."""
        runs: list[list[int]] = []
        for length in self.lengths:
            if runs and runs[-1][0] == length:
                runs[-1][1] += 1
            else:
                runs.append([length, 1])
        return runs

    @staticmethod
    def from_runs(runs: object, where: str) -> Grid:
        """Read the run-length form.

        Raises:
            ManifestError: not a list of pairs of positive integers, or absurdly many chunks.
        """
        lengths: list[int] = []
        if not isinstance(runs, list):
            raise ManifestError(f"{where}: the chunk lengths are not a list.")
        for run in runs:
            if not (isinstance(run, list) and len(run) == 2 and all(type(n) is int and n > 0 for n in run)):
                raise ManifestError(f"{where}: the chunk lengths hold {run!r} instead of [length, times].")
            if run[0] > MAX_CHUNK or len(lengths) + run[1] > MAX_CHUNKS:
                raise ManifestError(
                    f"{where}: chunks of {run[0]} bytes, {run[1]} times, are beyond all limits."
                )
            lengths.extend([run[0]] * run[1])
        return Grid(tuple(lengths))


def check_chunk_size(size: int) -> int:
    """Return `size` if it can be a chunk size.

    Raises:
        UsageError: outside 64 KiB to 256 MiB.
    """
    if not MIN_CHUNK <= size <= MAX_CHUNK:
        raise UsageError(
            f"a chunk size of {size} bytes is outside {MIN_CHUNK} to {MAX_CHUNK} (64 KiB to 256 MiB)."
        )
    return size


def fixed(size: int, chunk: int = DEFAULT_CHUNK) -> Grid:
    """Equal chunks, the last one shorter."""
    whole, rest = divmod(size, chunk)
    return Grid((chunk,) * whole + ((rest,) if rest else ()))


def by_tensors(
    size: int, data_start: int, tensors: Iterable[tuple[int, int]], chunk: int = DEFAULT_CHUNK
) -> Grid:
    """A grid that follows a safetensors file.

    Args:
        size: of the file, in bytes.
        data_start: where the data section begins (8 + header length).
        tensors: (start, stop) of each tensor in the file, absolute, contiguous, in file order.
        chunk: the largest chunk.
    """
    alone = chunk // ALONE
    cuts: list[int] = [0, data_start]
    end = data_start
    for start, stop in tensors:
        length = stop - start
        # A pack ends before a tensor that stands alone or would not fit any more.
        if (length >= alone or stop - cuts[-1] > chunk) and cuts[-1] != start:
            cuts.append(start)
        if length >= alone:
            cuts.append(stop)
        end = stop
    if end != cuts[-1]:
        cuts.append(end)
    if size != cuts[-1]:
        cuts.append(size)
    return Grid(tuple(_split(cuts, chunk)))


def _split(cuts: Sequence[int], chunk: int) -> Iterable[int]:
    for start, stop in pairwise(cuts):
        yield from fixed(stop - start, chunk).lengths
