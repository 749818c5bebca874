"""An object while one stager fills it, and what takes its bytes in.

Crash story: a chunk is marked after its bytes were written and its digest was checked, and its claim outlives
every write to it; see `object` for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.cache.digest import Hasher, hasher
from headrace.cache.errors import IntegrityError
from headrace.cache.manifest import ManifestFile
from headrace.cache.object import ObjectWriter
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress
from headrace.cache.threads import to_its_end

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from typing_extensions import Buffer

_SYNC_AFTER = 30.0
_CORRUPT_TRIES = 3


@dataclass
class Filling:
    """An object that this stager fills: the first file of the manifest with its content."""

    file: ManifestFile
    writer: ObjectWriter
    flying: set[int] = field(default_factory=set)
    cursor: int = 0
    syncing: bool = False
    synced: float = field(default_factory=time.monotonic)
    settled: bool = False
    checked: bool = False
    completing: bool = False
    done: bool = False
    tries: dict[int, int] = field(default_factory=dict)
    complete: bool = False
    """Whether it was complete when it was opened: then the map need not say so."""
    elsewhere: bool = False
    """Whether `data` was seen, which someone else has made, whatever the map says."""

    @property
    def full(self) -> bool:
        """Every chunk is there. Asked all the time, so without a system call that lets go of the GIL."""
        return self.elsewhere or self.writer.map.next_absent(0) < 0

    def claim(self, first: int, last: int) -> bool:
        """Claim the absent chunks [first, last) for this stager, which fetches none of them yet."""
        if not self.writer.claim(first, last):
            return False
        self.flying.update(range(first, last))
        return True

    def release(self, first: int, last: int) -> None:
        """Give a claim up, when nothing is written to the chunks any more."""
        self.writer.release(first, last)
        self.flying.difference_update(range(first, last))

    def count_corrupt(self, index: int, uri: str | None) -> None:
        """An origin sent a chunk with a wrong digest.

        Raises:
            IntegrityError: it did so too often.
        """
        self.tries[index] = self.tries.get(index, 0) + 1
        if self.tries[index] >= _CORRUPT_TRIES:
            start, stop = self.file.grid.span(index, index + 1)
            raise IntegrityError(
                f"{uri}/{self.file.path}: chunk {index} (bytes {start} to {stop}) does not have the digest of the "
                f"manifest, {_CORRUPT_TRIES} times: publish the model again, or repair the origin."
            )

    async def sync_sometimes(self, pool: Executor, cancel: Callable[[], None]) -> None:
        """What a power loss may cost is half a minute's work, as with any other file."""
        now = time.monotonic()
        if self.syncing or now - self.synced < _SYNC_AFTER:
            return
        self.syncing = True
        try:
            await to_its_end(pool, self.writer.sync, cancel=cancel)
        finally:
            self.syncing, self.synced = False, now


class Corrupt(Exception):
    """A chunk whose digest does not fit."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Stopped(Exception):
    """Nobody wants the rest of these bytes."""


class ChunkSink:
    """Takes adjacent chunks' bytes in order, and writes, hashes and marks chunk by chunk. Runs in threads.

    `stop` may be called from any thread: what is still put raises Stopped, also when it waits for its pace.
    """

    def __init__(
        self, filling: Filling, first: int, progress: Progress, source: str, pace: Pace | None = None
    ) -> None:
        """
        Args:
            first: the first chunk that is put.
            source: a key of `Progress.fetched`.
        """
        self._writer = filling.writer
        self._expected = filling.file.chunks
        self._grid = filling.file.grid
        self._index = first
        self._offset = self._grid.offsets[first]
        self._progress = progress
        self._source = source
        self._pace = pace
        self._stopped = False
        self._state: Hasher = hasher(self._writer.spec.algorithm)

    def stop(self) -> None:
        self._stopped = True

    def put(self, piece: Buffer) -> None:
        """Raises Corrupt at the first chunk that is wrong; chunks before it are marked."""
        view = memoryview(piece).cast("B")
        if self._pace is not None and not self._pace.take(self._source, len(view), lambda: self._stopped):
            raise Stopped
        while view:
            end = self._grid.offsets[self._index + 1]
            # As large as it came: large writes make large folios, which a later mmap is glad of.
            part = view[: end - self._offset]
            self._state.update(part)
            self._write(part)
            self._offset += len(part)
            view = view[len(part) :]
            if self._offset == end:
                self._finish_chunk()

    def _write(self, part: Buffer) -> None:
        self._writer.write(part, self._offset)

    def _finish_chunk(self) -> None:
        digest = self._state.digest()
        self._check(digest)
        self._mark(digest)
        self._index += 1
        self._state = hasher(self._writer.spec.algorithm)

    def _check(self, digest: bytes) -> None:
        if self._expected is not None and digest.hex() != self._expected[self._index]:
            raise Corrupt(self._index)

    def _mark(self, digest: bytes) -> None:
        self._writer.mark(self._index, digest)
        self._progress.add(self._source, self._grid.lengths[self._index])
