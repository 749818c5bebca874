"""How many connections: more while throughput grows.

A pure policy (no clock, no I/O): the stager feeds it samples, the simulator may too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ConnectionGrowth:
    """Doubles the connections while that gains at least `gain`, then settles on the best.

    Attributes:
        target: connections to have now.
        limit: never more than this.
        gain: throughput must grow by this factor to justify more connections.
        rest: samples to wait before trying again after it settled.
    """

    target: int = 8
    limit: int = 16
    gain: float = 1.3
    rest: int = 20
    _best: float = 0.0
    _best_target: int = 0
    _resting: int = 0

    def __post_init__(self) -> None:
        self.target = min(self.target, self.limit)

    def observe(self, rate: float) -> int:
        """Take a sample of bytes per second at the present target; returns the next target."""
        if self._resting:
            self._resting -= 1
            # The path may have become faster or slower: what was best is forgotten slowly.
            self._best = 0.9 * self._best + 0.1 * rate
            if not self._resting:
                self._raise()
            return self.target
        if rate > self._best * self.gain or not self._best_target:
            self._best, self._best_target = rate, self.target
            self._raise()
        else:
            self.target, self._resting = self._best_target, self.rest
        return self.target

    def _raise(self) -> None:
        self._best_target = self.target
        self.target = min(self.limit, self.target * 2)
        if self.target == self._best_target:
            self._resting = self.rest
