"""The tensor-completion curve of one node: how much of what has arrived is in whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 0.05
FROM = 0.25


class Tensors:
    """Which chunks each tensor needs. Tensors larger than the window are not counted, as if they were not there.

    Attributes:
        touched: for each chunk, the tensors that have bytes in it.
        bytes: of each tensor.
        needs: chunks that each tensor needs.
        share: for each chunk, its bytes in counted tensors.
        total: bytes of all counted tensors.
    """

    def __init__(self, tensors: Sequence[int], chunk: int, chunks: int) -> None:
        self.touched: list[list[int]] = [[] for _ in range(chunks)]
        self.share = [0] * chunks
        self.bytes: list[int] = []
        self.needs: list[int] = []
        most = WINDOW * sum(tensors)
        start = 0
        for size in tensors:
            stop = start + size
            if 0 < size <= most:
                number = len(self.bytes)
                self.bytes.append(size)
                first, last = start // chunk, (stop - 1) // chunk
                self.needs.append(last - first + 1)
                for index in range(first, last + 1):
                    self.touched[index].append(number)
                    self.share[index] += min(stop, (index + 1) * chunk) - max(start, index * chunk)
            start = stop
        self.total = sum(self.bytes)


class Curve:
    """What one node has, and the points of its curve: (arrived, complete), as fractions.

    Attributes:
        worst: the least complete/arrived from a quarter on.
    """

    __slots__ = ("_arrived", "_complete", "_left", "_next", "_tensors", "points", "worst")

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._left = list(tensors.needs)
        self._arrived = 0
        self._complete = 0
        self._next = 0.0
        self.worst = 1.0
        self.points: list[tuple[float, float]] = []

    def arrived(self, chunk: int) -> None:
        """A chunk is here, for the first time."""
        tensors, left = self._tensors, self._left
        self._arrived += tensors.share[chunk]
        for tensor in tensors.touched[chunk]:
            left[tensor] -= 1
            if not left[tensor]:
                self._complete += tensors.bytes[tensor]
        if self._arrived >= FROM * tensors.total and self._arrived:
            self.worst = min(self.worst, self._complete / self._arrived)
        if self._arrived >= self._next * tensors.total:
            self.points.append((self._arrived / tensors.total, self._complete / tensors.total))
            self._next += 0.01
