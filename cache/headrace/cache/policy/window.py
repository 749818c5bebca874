"""Which part of the plan is open: a window that moves on only with its start.

Inside it the order is free, so that nodes can have different chunks to give each other. That it does not run
ahead of its start is what makes tensors complete in order.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate


class Window:
    """The open part of one plan.

    Attributes:
        first: place in the order of the first chunk that is awaited.
        end: place after the last open chunk.
    """

    __slots__ = ("_bytes", "_least", "_offsets", "_order", "_passed", "_place", "end", "first")

    def __init__(self, sizes: Sequence[int], order: Sequence[int], fraction: float, least: int) -> None:
        """
        Args:
            sizes: bytes of each chunk.
            order: chunks, each once.
            fraction: of the plan's bytes that the window spans, at most.
            least: chunks that it spans in any case.
        """
        self._order = order
        self._offsets = array("q", [0, *accumulate(sizes[chunk] for chunk in order)])
        self._bytes = self._offsets[-1] * fraction
        self._least = least
        self._place = array("q", [-1]) * len(sizes)
        for place, chunk in enumerate(order):
            self._place[chunk] = place
        self._passed = bytearray(len(sizes))
        self.first = self.end = 0

    def place(self, chunk: int) -> int:
        """Where in the order a chunk comes; -1 where the plan does not have it."""
        return self._place[chunk]

    def open(self, chunk: int) -> bool:
        """Whether a chunk lies in the window, or before it."""
        return 0 <= self._place[chunk] < self.end

    def passed(self, chunk: int) -> bool:
        """A chunk is not awaited any more: it is here, or takes too long to come. True where that moves the start."""
        self._passed[chunk] = 1
        return self._place[chunk] == self.first

    def back(self, chunk: int) -> None:
        """A chunk is awaited again. The window begins there; it does not become shorter at its end."""
        self._passed[chunk] = 0
        place = self._place[chunk]
        if 0 <= place < self.first:
            self.first = place

    def advance(self) -> Sequence[int]:
        """Move on as far as the start allows; the chunks that are open now and were not before."""
        order, passed = self._order, self._passed
        place, count = self.first, len(order)
        if place < count and not passed[order[place]] and self.end:
            return ()
        while place < count and passed[order[place]]:
            place += 1
        self.first = place
        offsets = self._offsets
        limit = offsets[place] + self._bytes
        was = end = self.end
        least = min(count, place + self._least)
        # A chunk is open when all of it lies within the window.
        while end < count and (end < least or offsets[end + 1] <= limit):
            end += 1
        self.end = end
        return order[was:end]
