"""How fast bytes come into memory: from a device, directly or through the page cache, and from the page cache.

Nothing is read only to be measured: the first blocks of a load are the probe. A `Pace` says for each block
which way it should go, and is told how long that took. It begins with what history remembers of the device;
where that knows nothing of reads through the page cache, an early block tries one. Later the slower way gets
another chance at ever longer distances, so a wrong belief costs a few blocks and not a load.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from typing import Literal, get_args

Way = Literal["direct", "buffered"]
"""How a block that is not in memory can come into memory of our own."""

Kind = Literal["direct", "buffered", "mapped", "copied"]
"""What is measured: both ways; bringing what is not in memory into the page cache, to map it; and copying what is
in the page cache."""

ENOUGH = 64 * 1024 * 1024
"""Bytes that must have been measured before anything of it is worth remembering."""

_FIRST_TRY = 2  # the block at which the way that was never tried is tried
_NEXT_TRY = 16  # and the first at which the slower way is tried again
_FURTHER = 4  # the distance to the next try grows by this
_BETTER = 1.1  # the page cache must be faster by this to be preferred: direct reads cost less CPU time
_LAST = 8  # measurements that count
_LEAST = 1024 * 1024  # shorter reads say nothing


class Pace:
    """Rates of one device, shared by all threads and all files of a load.

    Args:
        threads: that read at once.
        remembered: bytes per second of each kind, all threads together, from earlier loads.
    """

    def __init__(self, threads: int, remembered: dict[Kind, float] | None = None) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._rates: dict[Kind, deque[float]] = {kind: deque(maxlen=_LAST) for kind in get_args(Kind)}
        for kind, rate in (remembered or {}).items():
            self._rates[kind].append(rate / threads)
        self._blocks = 0
        self._next_try = _NEXT_TRY if remembered and "buffered" in remembered else _FIRST_TRY
        self.measured = 0

    def rate(self, kind: Kind) -> float | None:
        """Bytes per second of all threads together, or None where that was never tried."""
        with self._lock:
            rate = self._median(kind)
        return None if rate is None else rate * self._threads

    def rates(self) -> dict[Kind, float]:
        """What is known, as `remembered` wants it."""
        return {kind: rate for kind in get_args(Kind) if (rate := self.rate(kind)) is not None}

    def next(self) -> Way:
        """The way for the next block that is not in memory."""
        with self._lock:
            self._blocks += 1
            best = self._best()
            if self._blocks <= self._next_try:
                return best
            self._next_try = max(_NEXT_TRY, self._next_try * _FURTHER)
            return "buffered" if best == "direct" else "direct"

    def record(self, kind: Kind, count: int, seconds: float) -> None:
        """`count` bytes came in so many seconds of one thread."""
        if count < _LEAST or seconds <= 0:
            return
        with self._lock:
            self._rates[kind].append(count / seconds)
            self.measured += count

    def _best(self) -> Way:
        direct, buffered = self._median("direct"), self._median("buffered")
        if direct is not None and buffered is not None and buffered > direct * _BETTER:
            return "buffered"
        return "direct"

    def _median(self, kind: Kind) -> float | None:
        return statistics.median(self._rates[kind]) if self._rates[kind] else None
