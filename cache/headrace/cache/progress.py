"""What a staging run has done so far; read from any thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

SOURCES = ("origin", "peer", "local")


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
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, source: str, size: int, chunks: int = 1) -> None:
        """Count verified chunks that a source gave."""
        with self._lock:
            self.fetched[source] += size
            self.chunks += chunks
            self.last_mark = time.monotonic()

    def absorb(self, fetched: dict[str, int], chunks: int) -> None:
        """Count what a worker process fetched, so far seen as `present`."""
        with self._lock:
            for source, size in fetched.items():
                self.fetched[source] += size
                self.present -= size
            self.chunks += chunks

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
