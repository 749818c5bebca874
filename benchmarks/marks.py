"""What a staging run had cost when its last chunk was marked."""

from __future__ import annotations

from benchmarks.measure import Cost, now

from headrace.cache.progress import Progress


class Sampled(Progress):
    """Takes the cost of the moment at every mark; the last one stays."""

    at_last_mark: Cost | None = None

    def add(self, source: str, size: int, chunks: int = 1) -> None:
        super().add(source, size, chunks)
        self.at_last_mark = now()
