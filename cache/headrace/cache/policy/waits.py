"""How long others take to read what this node waits for, and which chunk takes too long."""

from __future__ import annotations

from headrace.cache.policy.limits import Limits

_FACTOR = 4.0
_WEIGHT = 0.2


class Waits:
    """Chunks that other nodes read from the origin, since when, and how long that usually takes."""

    __slots__ = ("_limits", "_since", "_usual")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._since: dict[int, float] = {}
        self._usual: float | None = None

    def reading(self, chunk: int, now: float) -> bool:
        """Another node reads a chunk; True where that takes so long that nothing should wait for it."""
        since = self._since.setdefault(chunk, now)
        if self._usual is None:
            return False
        return now - since > max(self._limits.held_up, _FACTOR * self._usual)

    def over(self, chunk: int, now: float) -> None:
        """A chunk can be had now."""
        since = self._since.pop(chunk, None)
        if since is None:
            return
        if self._usual is None:
            self._usual = now - since
        else:
            self._usual += _WEIGHT * (now - since - self._usual)

    def forget(self, chunk: int) -> None:
        """A chunk is here."""
        self._since.pop(chunk, None)
