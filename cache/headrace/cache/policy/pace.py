"""How often the tracker is spoken to: soon while that helps, seldom when nothing is to be had or many ask.

All nodes together may ask only so often, so each takes the larger pauses the more nodes it knows of: those that
have the most common chunk it heard of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

from headrace.cache.policy.limits import Limits


class Pace:
    """When to ask, how much to ask for, how long news may wait.

    Attributes:
        ask_at: no question for sources before.
        crowd: nodes that are known to take part, at least.
    """

    __slots__ = ("_arrived", "_limits", "_looked", "_pause", "_random", "_rate", "ask_at", "crowd")

    def __init__(self, limits: Limits, random: Callable[[], float]) -> None:
        self._limits = limits
        self._random = random
        self._rate = 0.0
        self._arrived = 0
        self._looked = inf
        self._pause = limits.poll
        self.ask_at = -inf
        self.crowd = 0

    def arrived(self) -> None:
        """A chunk came."""
        self._arrived += 1

    def asked(self, now: float) -> None:
        """A question for sources goes out."""
        if now > self._looked:
            self._rate = (self._rate + self._arrived / (now - self._looked)) / 2
        self._looked, self._arrived = now, 0

    def heard(self, counts: Iterable[int]) -> None:
        """So many nodes have this and that chunk."""
        self.crowd = max(self.crowd, *counts, 0)

    def answered(self, wanted: int, found: int, now: float) -> None:
        """Sources were found for so many of the wanted chunks."""
        limits = self._limits
        if 2 * found >= wanted:
            self._pause = limits.poll
        elif not found:
            self._pause = min(self._pause * 2, limits.most_poll)
        pause = max(self._pause, self._crowded(limits.poll, limits.most_crowded))
        self.ask_at = now + pause * (0.5 + self._random())

    def pause(self) -> float:
        """How long to leave alone what nobody could give, as of the last answer."""
        return self._pause * (0.5 + self._random())

    def hasten(self, now: float) -> None:
        """Something has changed that makes a question worth while."""
        self.ask_at = min(self.ask_at, now)

    def ahead(self) -> int:
        """Chunks to have sources for: what arrives in the time that they are looked for ahead."""
        limits = self._limits
        seconds = max(limits.ahead, 2 * self._crowded(limits.poll, limits.most_crowded))
        return min(limits.batch, max(limits.downloads, int(self._rate * seconds)))

    def patience(self, first: bool) -> float:
        """How long the news of a chunk may wait; `first`: nobody else has it."""
        limits = self._limits
        return limits.announce if first else self._crowded(limits.announce, limits.most_announce)

    def _crowded(self, least: float, most: float) -> float:
        return min(most, least * (1 + self.crowd / self._limits.crowd))
