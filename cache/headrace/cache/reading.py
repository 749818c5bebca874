"""Reading a snapshot that is complete or still filling: what the loader opens.

A reader sees only chunks that the map calls readable. It keeps the snapshot from eviction by a shared
flock, and the inode of a filling object from being exchanged by a shared lock on its `READERS` byte.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headrace.cache import locks
from headrace.cache.chunkmap import ChunkMap
from headrace.cache.digest import Hasher, hasher
from headrace.cache.errors import CheckpointError, NotStaged, StagingStopped, StoreError
from headrace.cache.grid import Grid
from headrace.cache.learned import LearnedDigests
from headrace.cache.manifest import ManifestFile
from headrace.cache.object import READERS, ObjectFolder, being_staged
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain

if TYPE_CHECKING:
    from headrace.cache.staging import StagingJob

_POLL_FIRST, _POLL_MOST = 0.0005, 0.01
_ABANDONED = 5.0

Verified = Literal["this boot", "earlier boot", "never", "unknown"]
"""When every byte of an object was last verified; unknown where its notes are not this user's to read."""


class StoredFile:
    """One open file of a snapshot; the loader's `SourceFile`. Used by several threads."""

    def __init__(
        self, file: ManifestFile, folder: ObjectFolder, algorithm: str, check: Callable[[], None]
    ) -> None:
        """Open `data`, or `partial` with its map.

        Args:
            algorithm: of the chunks' digests.
            check: raises when staging in this process has failed.
        """
        self.path = file.path
        self.size = file.size
        self._algorithm = algorithm
        self._grid = file.grid
        self._published = file.chunks
        self._learned: LearnedDigests | None = None
        self._folder = folder
        self._check = check
        self._map: ChunkMap | None = None
        self._lock = -1
        # When a reader last waited, and when the object was last known to be staged by someone.
        self._waited = self._seen = 0.0
        try:
            self._fd = os.open(folder.data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd = self._open_partial()
        if os.fstat(self._fd).st_size != file.size:
            size = os.fstat(self._fd).st_size
            self.close()
            raise CheckpointError(
                f"{file.path!r} in the store has {size} bytes instead of {file.size}: run `headrace verify --repair`."
            )

    def _open_partial(self) -> int:
        folder = self._folder
        try:
            self._lock = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise NotStaged(
                f"{self.path!r} is still being staged by another user, who alone may read it until it is complete: "
                f"wait for `headrace stage` to end."
            ) from None
        except FileNotFoundError:
            raise NotStaged(f"{self.path!r} is not in the store any more: stage it again.") from None
        try:
            # While this lock is held no other inode takes the place of `partial` unfilled.
            locks.lock(self._lock, READERS, 1, exclusive=False)
            self._map = ChunkMap.open(folder.map, writable=os.access(folder.map, os.W_OK))
            for path in (folder.data, folder.partial, folder.data):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                if path == folder.data:
                    self._map.close()
                    self._map = None
                return fd
            raise NotStaged(f"{self.path!r} was evicted while it was opened: stage it again.")
        except BaseException:
            if self._map is not None:
                self._map.close()
            os.close(self._lock)
            raise

    def fileno(self) -> int:
        return self._fd

    @property
    def complete(self) -> bool:
        return self._map is None or self._map.full

    def ready(self, start: int, stop: int) -> bool:
        """Whether every byte of [start, stop) is present and verified."""
        return self._map is None or start >= stop or self._map.ready(*self._grid.covering(start, stop))

    def wait(self, start: int, stop: int, timeout: float | None = None) -> None:
        """Return when [start, stop) may be read, or `timeout` seconds passed; stagers are asked to take it first.

        Raises:
            StagingStopped: nobody has been staging for some seconds, this call's or those before it.
        """
        if self.ready(start, stop) or self._map is None:
            return
        begun = time.monotonic()
        if begun - self._waited > _ABANDONED / 5:
            self._seen = begun
        delay = _POLL_FIRST
        if os.access(self._folder.map, os.W_OK):
            self._map.want(*self._grid.covering(start, stop))
        while not self.ready(start, stop):
            self._check()
            self._waited = now = time.monotonic()
            if timeout is not None and now - begun > timeout:
                return
            if now - self._seen > _ABANDONED / 5:
                if being_staged(self._folder):
                    self._seen = now
                elif now - self._seen > _ABANDONED:
                    raise StagingStopped(
                        f"nobody is staging {self.path!r} any more, and it is incomplete: run `headrace stage` again."
                    )
            time.sleep(delay)
            delay = min(delay * 2, _POLL_MOST)

    # -- for a reader that verifies again ---------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        return self._grid

    def has_digests(self) -> bool:
        """Whether the chunks' digests are there to be read: published, or learned by this user's store."""
        return self._published is not None or self._open_learned() is not None

    def hasher(self) -> Hasher:
        """For one chunk's bytes."""
        return hasher(self._algorithm)

    def digest(self, index: int) -> bytes | None:
        """A readable chunk's digest, published or else learned; None where unknown."""
        if self._published is not None:
            return bytes.fromhex(self._published[index])
        learned = self._open_learned()
        return None if learned is None else learned.get(index)

    def verified(self) -> Verified:
        """When everything that is there was last verified against its digests."""
        try:
            with ChunkMap.open(self._folder.map, writable=False) as chunk_map:
                if chunk_map.verified_this_boot:
                    return "this boot"
                return "earlier boot" if chunk_map.verified_ever else "never"
        except (PermissionError, FileNotFoundError):
            return "unknown"

    def note_verified(self, *, good: bool) -> None:
        """Write down that every chunk was just verified, or that one is wrong, for whoever reads next.

        Nothing is written where this process may not write the store, for an object that is still filling (its
        stagers take notes themselves), nor where a repair has put another inode in place of the one read.
        """
        try:
            if not os.path.samestat(os.stat(self._folder.data), os.fstat(self._fd)):
                return
            with ChunkMap.open(self._folder.map, writable=True) as chunk_map:
                if good:
                    chunk_map.set_verified()
                else:
                    chunk_map.forget_verified()
                    chunk_map.sync()
        except (FileNotFoundError, PermissionError):
            return
        except OSError as error:
            if error.errno != errno.EROFS:
                raise StoreError(
                    f"the chunk map of {self.path!r} cannot be written ({error.strerror}): run `headrace verify`."
                ) from None

    def _open_learned(self) -> LearnedDigests | None:
        if self._learned is None:
            try:
                self._learned = LearnedDigests(self._folder.digests, writable=False)
            except (PermissionError, FileNotFoundError):
                return None
        return self._learned

    def close(self) -> None:
        for part in (self._map, self._learned):
            if part is not None:
                part.close()
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1


class StoredSnapshot:
    """A snapshot as a loader's `Source`; close it to give up its hold."""

    def __init__(
        self,
        domain: Domain,
        snapshot: Snapshot,
        *,
        name: str | None = None,
        check: Callable[[], None] = lambda: None,
        job: StagingJob | None = None,
    ) -> None:
        """
        Args:
            name: what the user called it, for messages.
            check: raises when staging in this process has failed.
            job: the staging that goes on in this process.

        Raises:
            NotStaged: it was evicted meanwhile.
        """
        hold = snapshot.hold()
        if hold is None:
            raise NotStaged(f"the snapshot {snapshot.id[:12]} was evicted meanwhile: stage it again.")
        self._hold = hold
        self._domain = domain
        self._check = check
        self.job = job
        self.manifest = snapshot.manifest()
        self.name = name or snapshot.id
        self.snapshot: str | None = snapshot.id
        self.folder: Path | None = snapshot.files if snapshot.complete else None

    def paths(self) -> tuple[str, ...]:
        return tuple(f.path for f in self.manifest.files)

    def open(self, path: str) -> StoredFile:
        """Raises NotStaged for a path that is not part of the snapshot."""
        file = self.manifest.by_path.get(path)
        if file is None:
            raise NotStaged(f"{self.name} has no file {path!r}.")
        object_id = self.manifest.object_id(self._domain.name, file)
        return StoredFile(file, self._domain.object(object_id), self.manifest.algorithm, self._check)

    def close(self) -> None:
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
