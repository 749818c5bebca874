"""How many nodes get one chunk from this node at once.

Who uploads slowly and gives a rare chunk to all that ask gives it to all of them late. Given to a few first, it goes
on from those. Where uploads are quick, that would only be more to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

SLOW = 0.25
"""Seconds of an upload from which on it is slow."""

TOGETHER = 2
"""So many get a chunk at once where uploads are slow: one would do, if it could be relied on."""

_FIRST = 0.1
_WEIGHT = 1 / 8
_RECENT = 8


class Uploads:
    """A node's uploads under way, by chunk. Times are in seconds, of any one clock.

    Attributes:
        seconds: how long an upload takes, smoothed.
    """

    def __init__(self) -> None:
        self.seconds = _FIRST
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._since: dict[Hashable, list[float]] = {}

    def full(self, chunk: Hashable, now: float) -> bool:
        """Whether who asks for a chunk should rather get it from somebody else, soon."""
        since = self._since.get(chunk, [])
        if len(since) < TOGETHER:
            return False
        # The quickest of some: a slow receiver does not make a slow sender.
        return min(self._recent, default=now - since[0]) > SLOW

    def begin(self, chunk: Hashable, now: float) -> None:
        """An upload begins."""
        self._since.setdefault(chunk, []).append(now)

    def end(self, chunk: Hashable, began: float, now: float, *, whole: bool) -> None:
        """An upload that began at `began` has ended; `whole`: with all of the chunk."""
        since = self._since[chunk]
        since.remove(began)
        if not since:
            del self._since[chunk]
        if whole:
            self._recent.append(now - began)
            self.seconds += (now - began - self.seconds) * _WEIGHT
