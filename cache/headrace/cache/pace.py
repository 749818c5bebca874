"""At what pace one job moves bytes: its process's buckets, and its class, which may change under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headrace.cache.bandwidth import KINDS, PIECE, Bandwidth, Class, Kind

_KINDS: dict[str, Kind] = {"origin": "origin", "peer": "peers"}


class Pace:
    """Asked before each piece, from any thread.

    Attributes:
        of: the job's class.
    """

    def __init__(self, bandwidth: Bandwidth | None = None, of: Class = "demand") -> None:
        self.bandwidth = bandwidth or Bandwidth()
        self.of = of

    @property
    def demand(self) -> bool:
        """Whether somebody waits for the job."""
        return self.of == "demand"

    def rate(self, kind: Kind) -> float | None:
        """Bytes per second that the job may move now; None: unlimited; 0: none."""
        return self.bandwidth.rate(kind, self.of)

    def set(self, of: Class, rates: Mapping[str, float | None], share: int = 1) -> None:
        """Another class, and other rates, at once.

        Args:
            rates: bytes per second by kind of traffic; None, or not named: no limit; 0: pause.
            share: how many processes share them evenly.
        """
        for kind in KINDS:
            rate = rates.get(kind)
            self.bandwidth.set_rate(kind, of, None if rate is None else rate / share)
        self.of = of

    def take(self, source: str, size: int, stop: Callable[[], bool]) -> bool:
        """Wait in this thread until `size` bytes may come from a source and be written; False when `stop` came true.

        Args:
            source: a key of `Progress.fetched`; bytes of this disk are only written.
        """
        kind = _KINDS.get(source)
        for start in range(0, size, PIECE):
            part = min(PIECE, size - start)
            if kind is not None and not self._take(kind, part, stop):
                return False
            if not self._take("disk", part, stop):
                return False
        return True

    def _take(self, kind: Kind, size: int, stop: Callable[[], bool]) -> bool:
        while not stop():
            of = self.of
            # Who waits as one class goes on as the other when that has changed.
            if self.bandwidth.take(kind, of, size, self._until(of, stop)):
                return True
        return False

    def _until(self, of: Class, stop: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: stop() or self.of != of
