"""Objects: one file's bytes in the store, with chunk map, learned digests and lock.

::

    objects/<object id>/grid       content key, chunk lengths, digest algorithm
                       /partial    being filled, 0600; or a repair under way when `data` exists
                       /data       complete, synced, 0444, final
                       /map, /digests, /lock

Crash story. `create` builds the folder under `tmp/` and renames it: a crash leaves a folder in `tmp/`.
Nothing is synced then: after a power loss a young folder may hold empty or torn files, which opening it
tells from a good one (`StoreError`); no chunk of it was durable, so it is thrown away and made again.
A crash while filling leaves marks that are true (see `chunkmap`) and claims that died with their
holder. `complete` syncs bytes, digests and marks, sets the mode, renames `partial` to `data`, syncs
the folder: before the rename the next stager finds a full map and completes; after it `data` exists
and is final, whatever the map says. A power loss: `recover`, under the exclusive lock, hashes again
what was written but not durable, and returns to absent what does not match.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cache import locks
from headrace.cache.chunkmap import ABSENT, DURABLE, WRITTEN, ChunkMap
from headrace.cache.digest import chunk_digest
from headrace.cache.disk import allocate
from headrace.cache.durable import TEMPORARY, sync_dir
from headrace.cache.errors import Held, StoreError
from headrace.cache.grid import Grid
from headrace.cache.learned import LearnedDigests

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Byte i of `lock` is the claim on chunk i; these are the object itself (shared: stagers; exclusive:
# completion, repair, eviction) and the readers of `partial` (shared), whose inode must not change.
WHOLE = 1 << 40
READERS = WHOLE + 1


@dataclass(frozen=True)
class ObjectSpec:
    """What an object is: its id, content key, grid, and the algorithm of its chunk digests."""

    id: str
    key: str
    grid: Grid
    algorithm: str

    @cached_property
    def size(self) -> int:
        return self.grid.size


class ObjectFolder:
    """The paths of one object."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.id = folder.name
        self.grid_file = folder / "grid"
        self.partial = folder / "partial"
        self.data = folder / "data"
        self.map = folder / "map"
        self.digests = folder / "digests"
        self.lock = folder / "lock"

    @property
    def complete(self) -> bool:
        return self.data.exists()

    def spec(self) -> ObjectSpec:
        """Raises StoreError when the folder is damaged."""
        try:
            stored = json.loads(self.grid_file.read_bytes())
            grid = Grid.from_runs(stored["lengths"], str(self.path))
            return ObjectSpec(self.id, stored["key"], grid, stored["algorithm"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the object {str(self.path)!r} is damaged ({error}): run `headrace rm`, stage again."
            ) from None


def create(spec: ObjectSpec, folder: ObjectFolder, tmp: Path) -> None:
    """Make the object's folder, all chunks absent, unless it exists.

    `partial` has its size but no space yet: `ObjectWriter.allocate` reserves it, unless the bytes turn
    out to be on this disk already.

    Raises:
        OSError: the file system refused (ENOSPC: nothing is left behind).
    """
    if folder.path.exists():
        return
    build = ObjectFolder(tmp / f"object-{uuid.uuid4().hex}")
    try:
        _build(spec, build)
        fd = os.open(build.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, spec.size)
        finally:
            os.close(fd)
        os.rename(build.path, folder.path)
    except OSError as error:
        shutil.rmtree(build.path, ignore_errors=True)
        # Another stager made the same object first: theirs is as good.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def create_complete(
    spec: ObjectSpec, folder: ObjectFolder, tmp: Path, source: Path, digests: Sequence[bytes]
) -> None:
    """Make a complete object of a finished, verified file, which is moved in (on the same file system).

    Args:
        digests: of its chunks, in the spec's algorithm.
    """
    if folder.complete:
        source.unlink()
        return
    build = ObjectFolder(tmp / f"object-{uuid.uuid4().hex}")
    try:
        _build(spec, build)
        learned = LearnedDigests(build.digests, writable=True)
        try:
            for index, digest in enumerate(digests):
                learned.put(index, digest)
            learned.sync()
        finally:
            learned.close()
        with ChunkMap.open(build.map, writable=True) as chunk_map:
            for index in range(len(spec.grid)):
                chunk_map.mark(index, DURABLE)
            chunk_map.set_verified()
            chunk_map.sync()
        source.chmod(0o444)
        sync_file(source)
        sync_file(build.grid_file)
        os.rename(source, build.data)
        sync_dir(build.path)
        try:
            os.rename(build.path, folder.path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Someone is filling the same object: `data` is final, whatever their map says.
            os.rename(build.data, folder.data)
            sync_dir(folder.path)
        sync_dir(folder.path.parent)
    finally:
        shutil.rmtree(build.path, ignore_errors=True)


def _build(spec: ObjectSpec, build: ObjectFolder) -> None:
    """Everything of an object's folder but its bytes; not synced."""
    build.path.mkdir(mode=0o755)
    build.path.chmod(0o755)
    stored = {"key": spec.key, "lengths": spec.grid.runs(), "algorithm": spec.algorithm}
    build.grid_file.write_bytes(json.dumps(stored).encode())
    build.grid_file.chmod(0o644)
    os.close(os.open(build.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    ChunkMap.create(build.map, len(spec.grid))
    LearnedDigests.create(build.digests, len(spec.grid), spec.algorithm)


class ObjectWriter:
    """A stager's open object: claims, writes, marks, completes.

    One writer belongs to one stager; its claims are held by its own open `lock` file. Claim methods
    are called from one thread; writes and syncs of claimed chunks from any.
    """

    def __init__(self, folder: ObjectFolder, spec: ObjectSpec) -> None:
        """Open an object for staging, recovering it first when it is of an earlier boot.

        Raises:
            StoreError: the folder is damaged or vanished (evicted: create it again).
        """
        self.folder = folder
        self.spec = spec
        self._lock = -1
        self._data = -1
        self._syncing = threading.Lock()
        self._unsynced: set[int] = set()
        try:
            self._lock = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
            locks.lock(self._lock, WHOLE, 1, exclusive=False)
            if not locks.same_inode(self._lock, folder.lock):
                raise FileNotFoundError(errno.ENOENT, "evicted meanwhile", str(folder.path))
            self.map = ChunkMap.open(folder.map, writable=True)
            self.learned = LearnedDigests(folder.digests, writable=True)
            differs = self.map.count != len(spec.grid) or self.learned.algorithm != spec.algorithm
            if differs or (not folder.complete and folder.spec() != spec):
                raise StoreError(f"the object {str(folder.path)!r} has another grid: run `headrace verify`.")
            self._open_data()
            if os.fstat(self._data).st_size != spec.size:
                raise StoreError(f"the object {str(folder.path)!r} has a wrong size: run `headrace verify`.")
            if not self.complete and not self.map.current:
                self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        return self.folder.complete

    @property
    def full(self) -> bool:
        """Every chunk is there; the object may still have to be completed."""
        return self.map.next_absent(0) < 0 or self.complete

    def present_bytes(self) -> int:
        """Bytes of the chunks that are there."""
        if self.complete:
            return self.spec.size
        return sum(n for n, s in zip(self.spec.grid.lengths, self.map.states(), strict=True) if s != ABSENT)

    def fileno(self) -> int:
        return self._data

    @property
    def unallocated_bytes(self) -> int:
        """Space that the file system has not reserved for this object yet."""
        return 0 if self.complete else max(0, self.spec.size - os.fstat(self._data).st_blocks * 512)

    def allocate(self) -> None:
        """Reserve the space of all chunks, so that a full disk shows now and not midway.

        Raises:
            OSError: ENOSPC.
        """
        # A reader that found everything there would see the time of change move, and take that for other bytes.
        if not self.full:
            allocate(self._data, self.spec.size)

    def claim(self, first: int, last: int) -> bool:
        """Claim the absent chunks [first, last); False if one is claimed elsewhere or no longer absent."""
        if not locks.try_lock(self._lock, first, last - first, exclusive=True):
            return False
        # The map may have changed between the look and the lock.
        if self.map.absent_run(first, last) < last:
            locks.unlock(self._lock, first, last - first)
            return False
        return True

    def claimed(self, first: int, last: int) -> bool:
        """Whether another stager of this node has claimed any of the chunks [first, last)."""
        return locks.is_locked(self._lock, first, last - first)

    def release(self, first: int, last: int) -> None:
        locks.unlock(self._lock, first, last - first)

    def write(self, data: Buffer, offset: int) -> None:
        """Write bytes of claimed chunks at a file offset."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._data, view, offset)
            view = view[written:]
            offset += written

    def mark(self, index: int, digest: bytes) -> None:
        """Make a chunk visible: its bytes are written and its digest was checked."""
        self.learned.put(index, digest)
        with self._syncing:
            self._unsynced.add(index)
        self.map.mark(index, WRITTEN)

    @property
    def unsynced_bytes(self) -> int:
        """Bytes this writer marked since its last `sync`."""
        with self._syncing:
            return sum(self.spec.grid.lengths[i] for i in self._unsynced)

    def sync(self) -> None:
        """WRITTEN -> DURABLE for what this writer marked so far.

        Raises:
            OSError: the disk lost bytes; every chunk that was only written is absent again.
        """
        with self._syncing:
            batch, self._unsynced = sorted(self._unsynced), set()
        if not batch:
            return
        self._sync_bytes()
        self.map.promote([i for i in batch if self.map.state(i) == WRITTEN])
        # `create` synced nothing: without these the marks would not outlast a power loss.
        self.map.sync()
        sync_file(self.folder.grid_file)

    def _sync_bytes(self) -> None:
        try:
            os.fdatasync(self._data)
            self.learned.sync()
        except OSError:
            # The page cache may have dropped what it could not write: nothing unsynced is believed.
            for index, state in enumerate(self.map.states()):
                if state == WRITTEN:
                    self.map.mark(index, ABSENT)
            raise

    def leave(self) -> None:
        """Give up the shared lock of a full object, so that whoever has the rest of its files may complete it."""
        locks.unlock(self._lock, WHOLE, 1)

    def join(self) -> None:
        """Take the shared lock again: there is something to fetch after all."""
        locks.lock(self._lock, WHOLE, 1, exclusive=False)

    def try_complete(self) -> bool:
        """Turn a full `partial` into `data`; True when `data` exists afterwards.

        Gives up the shared lock, so that of several stagers one gets the exclusive one. False means
        that another still holds its own: call again soon. Or, with the shared lock held again, that
        a failed sync or a repair took chunks back meanwhile: fetch those first.

        Raises:
            OSError: the sync failed.
        """
        self.leave()
        if self.complete:
            return True
        if not locks.try_lock(self._lock, WHOLE, 1, exclusive=True):
            return False
        shared = False
        try:
            if self.complete:
                return True
            if self.map.next_absent(0) >= 0:
                self.join()
                shared = True
                return False
            self._sync_bytes()
            for index, state in enumerate(self.map.states()):
                if state == WRITTEN:
                    self.map.mark(index, DURABLE)
            self.map.sync()
            sync_file(self.folder.grid_file)
            os.fchmod(self._data, 0o444)
            os.fsync(self._data)
            os.rename(self.folder.partial, self.folder.data)
            sync_dir(self.folder.path)
            return True
        finally:
            if not shared:
                locks.unlock(self._lock, WHOLE, 1)

    def adopt(self, source: Path) -> bool:
        """Become the same inode as another object's complete `data`, whose bytes were compared.

        False when another stager or a reader has this object open, or the file system links no more.
        The map stays as it is: marks speak of `partial`, which nobody may have open now, and where
        `data` exists they are not asked. A crash before the rename leaves a stray link, swept later.
        """
        if not locks.try_lock(self._lock, WHOLE, 2, exclusive=True):
            locks.lock(self._lock, WHOLE, 1, exclusive=False)
            return False
        link = self.folder.path / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            try:
                os.link(source, link)
            except OSError as error:
                if error.errno in (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP):
                    return False
                raise
            self.learned.sync()
            sync_file(self.folder.grid_file)
            os.rename(link, self.folder.data)
            self.folder.partial.unlink(missing_ok=True)
            sync_dir(self.folder.path)
            self.map.set_verified()
            os.close(self._data)
            self._data = -1
            self._open_data()
            return True
        finally:
            link.unlink(missing_ok=True)
            locks.unlock(self._lock, READERS, 1)
            locks.lock(self._lock, WHOLE, 1, exclusive=False)

    def _open_data(self) -> None:
        # `data` may appear between the two looks; never opened for writing (design: invariant 7).
        try:
            self._data = os.open(self.folder.data, os.O_RDONLY | os.O_CLOEXEC)
            return
        except FileNotFoundError:
            pass
        try:
            self._data = os.open(self.folder.partial, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._data = os.open(self.folder.data, os.O_RDONLY | os.O_CLOEXEC)

    def _recover(self) -> None:
        locks.unlock(self._lock, WHOLE, 1)
        locks.lock(self._lock, WHOLE, 1, exclusive=True)
        if not self.complete and not self.map.current:
            digests = self.learned.all(self.map.count)
            for index, state in enumerate(self.map.states()):
                if state == WRITTEN:
                    self.map.mark(index, WRITTEN if self._holds(index, digests[index]) else ABSENT)
                    self._unsynced.add(index)
            self._unsynced = {i for i in self._unsynced if self.map.state(i) == WRITTEN}
            # Durable chunks are believed: that the object was verified can be said when they were read again.
            if DURABLE in self.map.states():
                self.map.forget_verified()
            else:
                self.map.set_verified()
            self.map.set_current()
            self.map.sync()
        # A downgrade of an open-file-description lock is atomic.
        locks.lock(self._lock, WHOLE, 1, exclusive=False)

    def _holds(self, index: int, digest: bytes | None) -> bool:
        if digest is None:
            return False
        start, stop = self.spec.grid.span(index, index + 1)
        data = read_exactly(self._data, start, stop)
        return data is not None and chunk_digest(self.spec.algorithm, data) == digest

    def close(self) -> None:
        """Close descriptors; claims and the shared lock go with them."""
        for part in (getattr(self, "map", None), getattr(self, "learned", None)):
            if part is not None:
                part.close()
        for fd in (self._data, self._lock):
            if fd >= 0:
                os.close(fd)
        self._data = self._lock = -1


def read_exactly(fd: int, start: int, stop: int) -> bytes | None:
    """The bytes [start, stop) of a file, or None if it ends before."""
    parts = []
    while start < stop:
        part = os.pread(fd, stop - start, start)
        if not part:
            return None
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def learned_digests(folder: ObjectFolder, count: int) -> Sequence[bytes | None]:
    """The learned digests of an object, for reading."""
    learned = LearnedDigests(folder.digests, writable=False)
    try:
        return learned.all(count)
    finally:
        learned.close()


def being_staged(folder: ObjectFolder) -> bool:
    """Whether a stager holds the object's shared lock."""
    try:
        fd = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return locks.is_locked(fd, WHOLE, 1)
    finally:
        os.close(fd)


def lock_exclusively(folder: ObjectFolder, doing: str, timeout: float = 10.0) -> int:
    """An open `lock` held exclusively, for repair and eviction; close it to give it up.

    Raises:
        Held: stagers hold the object for longer than `timeout` seconds.
    """
    fd = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
    if not locks.lock(fd, WHOLE, 1, exclusive=True, timeout=timeout):
        os.close(fd)
        raise Held(f"the object {folder.id[:12]} is being staged, so {doing} has to wait: repeat it later.")
    return fd


def sync_file(path: Path) -> None:
    """fsync a file by its path."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def share(folder: ObjectFolder, other: ObjectFolder) -> bool:
    """Make a complete object the same inode as another whose bytes were compared; False if not possible.

    Open maps of the old inode keep its (equal) bytes. A crash leaves a stray link, swept later.
    """
    fd = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
    link = folder.path / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        if not locks.try_lock(fd, WHOLE, 1, exclusive=True):
            return False
        os.link(other.data, link)
        os.rename(link, folder.data)
        sync_dir(folder.path)
        return True
    except OSError as error:
        if error.errno in (errno.EMLINK, errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        link.unlink(missing_ok=True)
        os.close(fd)
