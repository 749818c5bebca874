"""Upload slots: how many uploads run at once, and who gets one."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass

from headrace.cache.bandwidth import CLASSES, Class
from headrace.cache.policy.uploads import Uploads


@dataclass(frozen=True, slots=True)
class Slot:
    """One upload: of which class, of which chunk, since when."""

    of: Class
    chunk: Hashable
    began: float


class Slots:
    """A fixed number of slots; uploads to come before others are never refused because of those others.

    Demand may use all of them. What is only pre-staged gets what demand leaves: so while it runs and demand comes,
    there may be up to twice as many uploads as slots for a while.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._uploads = Uploads()
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(CLASSES, 0)

    @property
    def count(self) -> int:
        return self._count

    @property
    def queue(self) -> int:
        """Uploads under way."""
        return sum(self._busy.values())

    def busy(self, of: Class) -> int:
        """Uploads of a class under way."""
        return self._busy[of]

    @property
    def seconds(self) -> float:
        """How long an upload takes, smoothed."""
        return self._uploads.seconds

    def take(self, of: Class, chunk: Hashable) -> Slot | None:
        """A slot, which `give` gives back; None when none is free, or enough other nodes are getting that chunk in
        the same class."""
        with self._lock:
            now = time.monotonic()
            taken = self._busy["demand"] + (self._busy["prestage"] if of == "prestage" else 0)
            if taken >= self._count or self._uploads.full((of, chunk), now):
                return None
            self._busy[of] += 1
            self._uploads.begin((of, chunk), now)
            return Slot(of, chunk, now)

    def give(self, slot: Slot, *, whole: bool) -> None:
        """An upload has ended; `whole`: with all of its chunk."""
        with self._lock:
            self._busy[slot.of] -= 1
            self._uploads.end((slot.of, slot.chunk), slot.began, time.monotonic(), whole=whole)
