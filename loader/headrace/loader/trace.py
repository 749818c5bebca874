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


_BRINGING = ("read", "gather", "populate", "wait")


class Trace:
    """Collects spans from any thread. `read` and `populate` are bytes being brought in by one read path or
    the other, `wait` is threads waiting for bytes that are not staged yet."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: dict[str, list[float]] = {}
        self._bringing = 0  # threads
        self._since = 0.0  # at least one of them
        self._covered = 0.0

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._origin

    def outside(self) -> float:
        """Seconds until now in which no thread was bringing bytes in, or waiting for some to be staged. (What a
        thread then waits for the interpreter is still counted as bringing in.)"""
        with self._lock:
            now = time.perf_counter()
            covered = self._covered + (now - self._since if self._bringing else 0.0)
            return now - self._origin - covered

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self._enter(name)
        try:
            yield
        finally:
            self._leave(name, begin)

    def _enter(self, name: str) -> float:
        with self._lock:
            now = time.perf_counter()
            if name in _BRINGING:
                self._bringing += 1
                if self._bringing == 1:
                    self._since = now
            return now

    def _leave(self, name: str, begin: float) -> None:
        with self._lock:
            now = time.perf_counter()
            if name in _BRINGING:
                self._bringing -= 1
                if not self._bringing:
                    self._covered += now - self._since
            entry = self._spans.setdefault(name, [begin, 0.0, 0])
            entry[0] = min(entry[0], begin)
            entry[1] += now - begin
            entry[2] += 1

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
