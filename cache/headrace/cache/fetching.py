"""Fetching alone: every absent chunk from this disk or the origin, in order, over some connections at once.

Several stagers (threads, processes, worker processes of one run) may do so for the same snapshot: every chunk is
claimed by a kernel lock before it is fetched, so each is fetched once, and again only after its request has
failed; when a stager dies its claims die with it, and the others, who poll, take over. Order is the manifest's,
so that whole tensors are there early; what a reader waits for goes first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from headrace.cache.errors import HeadraceError
from headrace.cache.filling import ChunkSink, Corrupt, Filling
from headrace.cache.growth import ConnectionGrowth
from headrace.cache.manifest import ManifestFile
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress
from headrace.cache.sources import ChunkSource
from headrace.cache.threads import stoppable

_POLL_FIRST, _POLL_MOST = 0.002, 0.1
_SAMPLE = 0.5


@dataclass(frozen=True, slots=True)
class _Span:
    """Claimed adjacent chunks [first, last) of one object, all from one source."""

    filling: Filling
    first: int
    last: int
    source: ChunkSource


@dataclass(frozen=True, slots=True)
class Pools:
    """A stager's threads; they end before any descriptor is closed.

    Attributes:
        writing: hash and write what arrives.
        syncing: wait for the disk.
        cancel: ends long work in them.
    """

    writing: Executor
    syncing: Executor
    cancel: Callable[[], None]


class Bringing(Protocol):
    """How a stager's absent chunks come."""

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Start; what runs are tasks of the group."""
        ...

    def go_on(self) -> None:
        """Called again and again while anything is absent, also after chunks were taken back."""
        ...

    async def end(self) -> None:
        """Everything is there: nothing runs any more when this returns."""
        ...


class Fetching:
    """The fetchers of one stager."""

    def __init__(
        self,
        fillings: Callable[[], Sequence[Filling]],
        sources: Sequence[ChunkSource],
        progress: Progress,
        pools: Pools,
        *,
        uri: str | None,
        span: int,
        connections: int,
        pace: Pace | None = None,
    ) -> None:
        """
        Args:
            fillings: gives what is not complete.
            sources: cheapest first; the last, the origin, has everything, and its word is final.
            uri: of the model, for messages.
            span: bytes that are claimed and read at once.
            connections: never more than this many reads at once.
            pace: how fast; None: as fast as it goes.
        """
        self._fillings = fillings
        self._sources = sources
        self._progress = progress
        self._pools = pools
        self._uri = uri
        self._span = span
        self._pace = pace
        self._growth = ConnectionGrowth(limit=connections)
        self._fetchers = 0

    def begin(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._watching = group.create_task(self._watch())

    def go_on(self) -> None:
        while self._fetchers < self._growth.target:
            self._fetchers += 1
            self._group.create_task(self._fetcher())
        self._progress.connections = self._growth.target

    async def end(self) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        """Sample throughput, and let the connections follow."""
        before, moved = time.monotonic(), 0
        while True:
            await asyncio.sleep(_SAMPLE)
            now, own = time.monotonic(), sum(self._progress.fetched.values())
            if not any(f.flying for f in self._fillings()):
                before, moved = now, own
            # A sample is fair when each connection has had the time to bring a span.
            elif own - moved >= self._growth.target * self._span:
                self._growth.observe((own - moved) / (now - before))
                self.go_on()
                before, moved = now, own

    async def _fetcher(self) -> None:
        delay = _POLL_FIRST
        try:
            while self._fetchers <= self._growth.target:
                span = self._next_span()
                if span is None:
                    if all(f.full for f in self._fillings()):
                        return
                    # Others hold the rest, or it is in flight here: look again soon, and take over.
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, _POLL_MOST)
                    continue
                delay = _POLL_FIRST
                await self._fetch(span)
        finally:
            self._fetchers -= 1

    def _next_span(self) -> _Span | None:
        for filling in self._fillings():
            for index in list(filling.writer.map.wanted()):
                if index not in filling.flying and (span := self._claim(filling, index)):
                    return span
        for filling in self._fillings():
            chunk_map = filling.writer.map
            index = chunk_map.next_absent(filling.cursor)
            while index >= 0:
                if index in filling.flying:
                    index = chunk_map.next_absent(index + 1)
                    continue
                if span := self._claim(filling, index):
                    return span
                index = chunk_map.next_absent(index + 1)
            filling.cursor = 0
        return None

    def _claim(self, filling: Filling, first: int) -> _Span | None:
        """Claim as many adjacent chunks as one request may bring, or at least the first."""
        file, lengths = filling.file, filling.file.grid.lengths
        source = self._source_of(file, first, filling.tries.get(first, 0))
        end = filling.writer.map.absent_run(first, len(lengths))
        last, size = first + 1, lengths[first]
        while (
            last < end
            and last not in filling.flying
            and size + lengths[last] <= self._span
            and self._source_of(file, last, filling.tries.get(last, 0)) is source
        ):
            size += lengths[last]
            last += 1
        for stop in dict.fromkeys((last, first + 1)):
            if filling.claim(first, stop):
                filling.cursor = first
                return _Span(filling, first, stop, source)
        return None

    def _source_of(self, file: ManifestFile, index: int, failed: int) -> ChunkSource:
        """The cheapest source that has the chunk; after a failure only the last, the origin."""
        if failed:
            return self._sources[-1]
        return next(s for s in self._sources if s.has(file, index))

    async def _fetch(self, span: _Span) -> None:
        filling = span.filling
        sink = ChunkSink(filling, span.first, self._progress, span.source.name, self._pace)
        try:
            reading = span.source.read_to(filling.file, span.first, span.last, sink.put, self._pools.writing)
            await (reading if self._pace is None else stoppable(reading, sink.stop))
        except Corrupt as bad:
            filling.count_corrupt(bad.index, self._uri)
        except HeadraceError:
            # A cheaper source may fail; the origin's word is final.
            if span.source is self._sources[-1]:
                raise
            for index in range(span.first, span.last):
                filling.tries[index] = filling.tries.get(index, 0) + 1
        finally:
            filling.release(span.first, span.last)
            filling.cursor = min(filling.cursor, span.first)
        await filling.sync_sometimes(self._pools.syncing, self._pools.cancel)
