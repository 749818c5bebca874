"""Bandwidth: token buckets by kind of traffic and by class, whose rates can be changed at any time.

What a waiting pod needs is `demand`, what is only fetched ahead is `prestage`. Who moves bytes asks for each
piece (of at most `PIECE`) before it moves, so that a change of a rate reaches a transfer that is under way. Every
process has its own buckets; nothing is limited until somebody says so.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal, get_args

Kind = Literal["origin", "peers", "disk"]
Class = Literal["demand", "prestage"]

KINDS: tuple[Kind, ...] = get_args(Kind)
CLASSES: tuple[Class, ...] = get_args(Class)
PIECE = 1 << 20
"""Bytes to ask for at once, at most."""

_BURST = 0.05  # seconds of its rate that a rested bucket holds
_LOOK = (
    0.05  # seconds until a waiter looks again, at most: rates change, and whoever waits may be told to stop
)


class Bucket:
    """One token bucket; pure: the clock is passed in.

    Over any time t no more than `rate` x (t + a twentieth of a second) bytes are given, and one piece.
    """

    def __init__(self, rate: float | None, now: float) -> None:
        """
        Args:
            rate: bytes per second; None: unlimited; 0: nothing at all.
            now: seconds, of any clock that does not go back.
        """
        self._rate = rate
        self._level = 0.0
        self._at = now

    @property
    def rate(self) -> float | None:
        return self._rate

    def set_rate(self, rate: float | None, now: float) -> None:
        """What was saved up or overdrawn at the old rate is settled at the new one."""
        self._fill(now)
        self._rate = rate
        if rate is None:
            self._level = 0.0

    def take(self, size: int, now: float) -> float:
        """Take `size` bytes: 0 when they were given; else how many seconds to wait before asking again
        (`inf`: until the rate changes).

        Whoever finds anything left gets all of its piece; those who come after wait until it is made up for.
        """
        if self._rate is None:
            return 0.0
        self._fill(now)
        if self._rate == 0:
            return math.inf
        if self._level < 0:
            return -self._level / self._rate
        self._level -= size
        return 0.0

    def _fill(self, now: float) -> None:
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        if self._rate:
            self._level = min(self._level + passed * self._rate, self._rate * _BURST)


class Bandwidth:
    """The buckets of one process; used from any thread and any event loop."""

    def __init__(
        self,
        rates: Mapping[tuple[Kind, Class], float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._buckets = {
            (kind, of): Bucket((rates or {}).get((kind, of)), clock()) for kind in KINDS for of in CLASSES
        }

    def set_rate(self, kind: Kind, of: Class, rate: float | None) -> None:
        """Bytes per second from now on; None: unlimited; 0: paused."""
        with self._changed:
            self._buckets[kind, of].set_rate(rate, self._clock())
            self._changed.notify_all()

    def rate(self, kind: Kind, of: Class) -> float | None:
        """Bytes per second; None: unlimited."""
        return self._buckets[kind, of].rate

    def take(self, kind: Kind, of: Class, size: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait in this thread until `size` bytes may move; False when `stop` came true before.

        Args:
            size: at most `PIECE`, so that the next change of the rate is not far.
            stop: asked about every twentieth of a second.
        """
        bucket = self._buckets[kind, of]
        if bucket.rate is None:
            return True
        with self._changed:
            while wait := bucket.take(size, self._clock()):
                if stop():
                    return False
                self._changed.wait(min(wait, _LOOK))
        return True

    async def taken(self, kind: Kind, of: Class, size: int) -> None:
        """The same for a task, which may be cancelled meanwhile."""
        bucket = self._buckets[kind, of]
        while bucket.rate is not None:
            with self._changed:
                wait = bucket.take(size, self._clock())
            if not wait:
                return
            await asyncio.sleep(min(wait, _LOOK))


class Allowance:
    """One upload's share: how much it may send next.

    While its class has no limit that is everything that is left: it asks again as soon as it has to wait for the
    other side, so a limit that comes soon holds.
    """

    def __init__(self, bandwidth: Bandwidth, of: Class, stop: Callable[[], bool]) -> None:
        """
        Args:
            stop: ends the waiting for more.
        """
        self._bandwidth = bandwidth
        self._of: Class = of
        self._stop = stop
        self._taken = 0

    def ask(self, left: int) -> int:
        """How many of `left` bytes may move now; 0 when `stop` came true."""
        if self._taken:
            return self._taken
        if self._bandwidth.rate("peers", self._of) is None:
            return left
        size = min(left, PIECE)
        if not self._bandwidth.take("peers", self._of, size, self._stop):
            return 0
        self._taken = size
        return size

    def used(self, size: int) -> None:
        """So many of them have moved."""
        self._taken = max(0, self._taken - size)
