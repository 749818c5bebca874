"""Where the time of one load went: named spans, cheap enough to be always on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Time spent under one name.

    Attributes:
        name: resolve, open, header, plan, agree, place, read, populate, wait, together and the like.
        start: seconds from the beginning of the load to the first time.
        seconds: summed over all times and threads, so two busy threads count twice.
        count: how many times.
    """

    name: str
    start: float
    seconds: float
    count: int


class Trace:
    """Collects spans from any thread. `read` and `populate` are bytes being brought in by one read path or
    the other, `wait` is threads waiting for bytes that are not staged yet."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: dict[str, list[float]] = {}

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._origin

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, begin, time.perf_counter())

    def add(self, name: str, begin: float, end: float, count: int = 1) -> None:
        """Record one time from `begin` to `end`, both by `time.perf_counter()`."""
        with self._lock:
            entry = self._spans.setdefault(name, [begin, 0.0, 0])
            entry[0] = min(entry[0], begin)
            entry[1] += end - begin
            entry[2] += count

    def events(self) -> int:
        """How often anything was recorded: it changes as work is done."""
        with self._lock:
            return sum(int(count) for _, _, count in self._spans.values())

    def spans(self) -> tuple[Span, ...]:
        """What was recorded so far, by first start."""
        with self._lock:
            spans = [
                Span(name, begin - self._origin, seconds, int(count))
                for name, (begin, seconds, count) in self._spans.items()
            ]
        return tuple(sorted(spans, key=lambda span: span.start))
