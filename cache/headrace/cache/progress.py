"""What a staging run has done so far; read from any thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

SOURCES = ("origin", "peer", "local")
COUNTS = ("tracker_calls", "claims", "claims_returned", "second_tries", "peers_left_alone")
"""What a run does in a cluster: calls of the tracker, claims that it was given and that it gave back without having
brought their chunks, transfers that got another one beside them, and peers that were left alone for a while."""


@dataclass
class Progress:
    """Counters of one run.

    Attributes:
        total: bytes of the snapshot; 0 until it is resolved.
        present: bytes that were there before, or that other stagers brought.
        fetched: bytes by source in this run.
        chunks: chunks fetched in this run.
        phase: "resolving", "staging", "completing", "staged".
        connections: in use now.
        counts: see `COUNTS`.
        last_mark: when the last chunk was marked (time.monotonic).
        notes: what the user should know though it is no error.
    """

    total: int = 0
    present: int = 0
    fetched: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SOURCES, 0))
    chunks: int = 0
    phase: str = "resolving"
    connections: int = 0
    started: float = field(default_factory=time.monotonic)
    last_mark: float = 0.0
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, source: str, size: int, chunks: int = 1) -> None:
        """Count verified chunks that a source gave."""
        with self._lock:
            self.fetched[source] += size
            self.chunks += chunks
            self.last_mark = time.monotonic()

    def count(self, what: str, number: int = 1) -> None:
        """Count one of `COUNTS`."""
        with self._lock:
            self.counts[what] += number

    def absorb(self, fetched: dict[str, int], chunks: int, counts: dict[str, int]) -> None:
        """Count what a worker process did; what it fetched was so far seen as `present`."""
        with self._lock:
            for source, size in fetched.items():
                self.fetched[source] += size
                self.present -= size
            self.chunks += chunks
            for what, number in counts.items():
                self.counts[what] += number

    def note(self, text: str) -> None:
        """Say something to the user that is no error."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    @property
    def done(self) -> int:
        return min(self.total, self.present + sum(self.fetched.values()))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
