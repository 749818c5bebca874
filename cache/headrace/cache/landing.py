"""One chunk on its way from other nodes or the origin, by one transfer or by two.

Two transfers of a chunk never mix. Whoever holds the chunk's kernel claim has a `Landing` for it, and the first
transfer writes into the file as its bytes arrive. A second one beside it (a hedge) collects the chunk in memory,
checks it there, and only then writes it. Every write to the file goes through the landing's lock: once a transfer
has settled the chunk (its digest was right and the chunk is marked), nothing is written to it any more, and
what the other still brings is dropped. The chunk is marked in the same step that settles it, so whatever the
first transfer left half written in the file before is covered by then. The claim is given up when both have ended.

Crash story: as with any chunk: what is not marked does not count, and a claim dies with its holder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headrace.cache.digest import chunk_digest
from headrace.cache.filling import ChunkSink, Corrupt, Filling, Stopped
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Buffer

Landed = Callable[[int, bytes], None]
"""Told of each settled chunk's index and digest, in the thread that settled it."""


class Landing:
    """One claimed chunk.

    Attributes:
        users: transfers under way.
        direct: whether one of them writes into the file.
    """

    def __init__(self, filling: Filling, index: int) -> None:
        self.filling = filling
        self.index = index
        self.users = 0
        self.direct = False
        self._lock = threading.Lock()
        self._settled = False

    def write(self, part: Buffer, offset: int) -> None:
        """Write some of the chunk's bytes, unless it is settled."""
        with self._lock:
            if not self._settled:
                self.filling.writer.write(part, offset)

    def settle(self, digest: bytes, whole: Buffer | None = None) -> bool:
        """Mark the chunk, whose right bytes are in the file or are `whole`; False if it was settled before."""
        with self._lock:
            if self._settled:
                return False
            if whole is not None:
                self.filling.writer.write(whole, self.filling.file.grid.offsets[self.index])
            self.filling.writer.mark(self.index, digest)
            self._settled = True
            return True


class LandingSink(ChunkSink):
    """Takes the bytes of adjacent chunks into the file."""

    def __init__(
        self,
        landings: Sequence[Landing],
        progress: Progress,
        source: str,
        pace: Pace,
        *,
        expected: Sequence[bytes | None],
        landed: Landed,
    ) -> None:
        """
        Args:
            expected: the chunks' digests; None: whatever the origin sends is right.
        """
        self._first = landings[0].index
        super().__init__(landings[0].filling, self._first, progress, source, pace)
        self._landings = landings
        self._digests = expected
        self._landed = landed

    def _write(self, part: Buffer) -> None:
        self._landings[self._index - self._first].write(part, self._offset)

    def _check(self, digest: bytes) -> None:
        if self._digests[self._index - self._first] not in (None, digest):
            raise Corrupt(self._index)

    def _mark(self, digest: bytes) -> None:
        if self._landings[self._index - self._first].settle(digest):
            self._progress.add(self._source, self._grid.lengths[self._index])
            self._landed(self._index, digest)


class MemorySink:
    """Takes the bytes of one chunk into memory, and into the file when they are right."""

    def __init__(
        self,
        landing: Landing,
        progress: Progress,
        source: str,
        pace: Pace,
        *,
        expected: bytes,
        landed: Landed,
    ) -> None:
        self._landing = landing
        self._bytes = bytearray(landing.filling.file.grid.lengths[landing.index])
        self._have = 0
        self._progress = progress
        self._source = source
        self._pace = pace
        self._expected = expected
        self._landed = landed
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def put(self, piece: Buffer) -> None:
        """Raises Corrupt when the chunk is whole and wrong."""
        view = memoryview(piece).cast("B")
        if not self._pace.take(self._source, len(view), lambda: self._stopped):
            raise Stopped
        self._bytes[self._have : self._have + len(view)] = view
        self._have += len(view)
        if self._have < len(self._bytes):
            return
        landing = self._landing
        digest = chunk_digest(landing.filling.writer.spec.algorithm, self._bytes)
        if digest != self._expected:
            raise Corrupt(landing.index)
        if landing.settle(digest, self._bytes):
            self._progress.add(self._source, len(self._bytes))
            self._landed(landing.index, digest)
