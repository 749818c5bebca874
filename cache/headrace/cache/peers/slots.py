"""Upload slots: how many uploads run at once, and who gets one."""

from __future__ import annotations

import threading

from headrace.cache.bandwidth import CLASSES, Class


class Slots:
    """A fixed number of slots; uploads to come before others are never refused because of those others.

    Demand may use all of them. What is only pre-staged gets what demand leaves: so while it runs and demand comes,
    there may be up to twice as many uploads as slots for a while.
    """

    def __init__(self, count: int) -> None:
        self._count = count
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

    def take(self, of: Class) -> bool:
        """A slot, which `give` gives back; False when none is free."""
        with self._lock:
            taken = self._busy["demand"] + (self._busy["prestage"] if of == "prestage" else 0)
            if taken >= self._count:
                return False
            self._busy[of] += 1
            return True

    def give(self, of: Class) -> None:
        with self._lock:
            self._busy[of] -= 1
