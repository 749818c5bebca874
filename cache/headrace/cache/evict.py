"""Eviction: remove a snapshot, or collect what is least recently used; nothing held ever goes.

Held is what has a pin, a hold record, or a shared flock on its `hold` file (readers, stagers). The
evictor takes that flock exclusively while it moves the snapshot, so that no reader slips in between.

Crash story. Under the store's `lock`, exclusive (stagers open their objects under it, shared): the
snapshot's folder is renamed into `trash/`, that is synced, then each object that no other manifest
names and nobody has open follows, then the trash is deleted. A crash after the first rename leaves
objects without a snapshot, which `collect` finds, and trash, which the next `Store.open` deletes; a
power loss may bring a snapshot back whole, never without its objects. Who stages the same snapshot
meanwhile makes it again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cache import disk, holds, locks
from headrace.cache.durable import TEMPORARY, sync_dir
from headrace.cache.errors import Held, ManifestError, NotStaged, UsageError
from headrace.cache.object import WHOLE, ObjectFolder, being_staged
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain, Store, claim_folder

# A staging that was cut short may be resumed within this time, in seconds.
LEFTOVER_AGE = 86400.0


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed.

    Attributes:
        kind: "snapshot", or "leftover" for objects that belonged to none.
        id: of the snapshot or object.
        names: references that pointed to it.
        bytes: freed on disk, counted by inode; what other snapshots share is not freed.
        objects: how many objects went with it.
        why: in words.
    """

    kind: str
    domain: str
    id: str
    names: tuple[str, ...]
    bytes: int
    objects: int
    why: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A snapshot that could not go, and why."""

    domain: str
    id: str
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class CollectReport:
    """One collection.

    Attributes:
        before, after: bytes of the store on disk, counted by inode.
        excess: bytes over the limit that could not be freed.
    """

    before: int
    after: int
    excess: int
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]


def remove(store: Store, domain: Domain, snapshot: Snapshot, *, force: bool = False) -> Removed:
    """Remove one snapshot, and the objects that no other one needs.

    Args:
        force: also though it is pinned; never though it is in use.

    Raises:
        Held: pinned, published as a volume, read or staged right now; says which.
        NotStaged: it is gone.
    """
    with disk.translate(snapshot.path, "removing a snapshot"):
        return _remove(store, domain, snapshot, force=force, why="asked for")


def pin(snapshot: Snapshot, reason: str = "") -> None:
    """Keep a snapshot from eviction until `unpin`.

    Raises:
        NotStaged: it is gone.
    """
    hold = snapshot.hold()
    if hold is None:
        raise NotStaged(f"the snapshot {snapshot.id[:12]} is not in this store: stage it.")
    try:
        with disk.translate(snapshot.path, "pinning"):
            snapshot.pin(reason)
    finally:
        os.close(hold)


def unpin(snapshot: Snapshot) -> None:
    """Let eviction have a pinned snapshot; not an error when it is not pinned."""
    with disk.translate(snapshot.path, "unpinning"):
        snapshot.unpin()


def collect(
    store: Store, *, max_bytes: int | None = None, leftover_age: float = LEFTOVER_AGE
) -> CollectReport:
    """Remove leftovers, then the least recently used snapshots until the store fits into `max_bytes`.

    Args:
        max_bytes: of the whole store on disk; None removes leftovers only.
        leftover_age: seconds for which an incomplete snapshot that nobody stages, an object without a
            snapshot, or a temporary file is let be.

    Raises:
        UsageError: a negative limit.
        StoreError: the file system refused.
    """
    if max_bytes is not None and max_bytes < 0:
        raise UsageError(f"a store cannot be limited to {max_bytes} bytes: give 0 or more.")
    with disk.translate(store.root, "collecting"):
        before = usage(store)
        oldest = time.time() - leftover_age
        removed: list[Removed] = []
        kept: list[Kept] = []
        for folder in (store.root, store.root / "holds"):
            _sweep_folder(folder, oldest)
        for domain in store.domains():
            _sweep_temporaries(domain, oldest)
            for snapshot in domain.snapshots():
                if not snapshot.complete and snapshot.last_used < oldest:
                    _try_remove(store, domain, snapshot, "never completed", removed, kept)
            removed += _remove_orphans(store, domain, oldest)
        size = usage(store)
        if max_bytes is not None:
            order = [(s.last_used, s.id, d, s) for d in store.domains() for s in d.snapshots()]
            for _, _, domain, snapshot in sorted(order, key=lambda entry: entry[:2]):
                if size <= max_bytes:
                    break
                size -= _try_remove(store, domain, snapshot, "least recently used", removed, kept)
        after = usage(store)
        excess = 0 if max_bytes is None else max(0, after - max_bytes)
        return CollectReport(before, after, excess, tuple(removed), tuple(dict.fromkeys(kept)))


def usage(store: Store) -> int:
    """Bytes of the store on disk (blocks in use, each inode once)."""
    return sum(size for size, _, _ in _inodes(store.root).values())


def held_by(store: Store, domain: Domain, snapshot: Snapshot) -> str | None:
    """Why a snapshot is kept by a pin or a volume, or None; readers show only when it is removed."""
    if (reason := snapshot.pinned) is not None:
        return f"it is pinned ({reason})" if reason else "it is pinned"
    return _volume(store, domain, snapshot)


# -- removing


def _volume(store: Store, domain: Domain, snapshot: Snapshot) -> str | None:
    for record in holds.records(store):
        if (record.domain, record.snapshot) == (domain.name, snapshot.id):
            return f"the volume {record.id} uses it ({record.holder})"
    return None


def _remove(store: Store, domain: Domain, snapshot: Snapshot, *, force: bool, why: str) -> Removed:
    with _bin(store) as bin_folder:
        with store.structure(exclusive=True):
            names = _names(snapshot)
            objects = _object_ids(domain, snapshot)
            _move_snapshot(store, domain, snapshot, bin_folder, force=force)
            unneeded = sorted(objects - _named_objects(domain))
            gone = [i for i in unneeded if _move_object(domain.object(i), bin_folder)]
            sync_dir(domain.path / "objects")
        freed = _freed(bin_folder)
    return Removed("snapshot", domain.name, snapshot.id, names, freed, len(gone), why)


def _move_snapshot(
    store: Store, domain: Domain, snapshot: Snapshot, bin_folder: Path, *, force: bool
) -> None:
    """Rename the snapshot into the trash while no reader can take a hold; raises Held, NotStaged."""

    def refuse(why: str) -> Held:
        return Held(f"the snapshot {snapshot.id[:12]} stays: {why}.")

    fd = -1
    try:
        try:
            fd = os.open(snapshot.hold_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            # Without the file nobody can hold it either (a damaged snapshot).
            if not snapshot.path.exists():
                raise NotStaged(f"the snapshot {snapshot.id[:12]} is not in this store.") from None
        if fd >= 0 and not locks.try_flock(fd, exclusive=True):
            raise refuse(_who_reads(domain, snapshot))
        if not force and snapshot.pinned is not None:
            raise refuse(f"{held_by(store, domain, snapshot)}; unpin it first")
        if (volume := _volume(store, domain, snapshot)) is not None:
            raise refuse(volume)
        os.rename(snapshot.path, bin_folder / "snapshot")
        sync_dir(snapshot.path.parent)
    finally:
        if fd >= 0:
            os.close(fd)


def _who_reads(domain: Domain, snapshot: Snapshot) -> str:
    if any(being_staged(domain.object(i)) for i in _object_ids(domain, snapshot)):
        return "it is being staged"
    return "a reader has it open"


def _move_object(folder: ObjectFolder, bin_folder: Path) -> bool:
    """Rename an object into the trash unless somebody has it open or it is gone."""
    fd = -1
    try:
        try:
            fd = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if not folder.path.exists():
                return False
        # Both bytes: nobody stages it, nobody reads its `partial`.
        if fd >= 0 and not locks.try_lock(fd, WHOLE, 2, exclusive=True):
            return False
        os.rename(folder.path, bin_folder / folder.id)
        return True
    finally:
        if fd >= 0:
            os.close(fd)


def _try_remove(
    store: Store, domain: Domain, snapshot: Snapshot, why: str, removed: list[Removed], kept: list[Kept]
) -> int:
    """Remove a snapshot if it may go; the bytes that were freed."""
    try:
        done = _remove(store, domain, snapshot, force=False, why=why)
    except Held as error:
        # In use is used: the one who may write says so for readers who may not.
        if snapshot.pinned is None:
            snapshot.touch_used()
        kept.append(Kept(domain.name, snapshot.id, _names(snapshot), str(error)))
        return 0
    except NotStaged:
        return 0
    removed.append(done)
    return done.bytes


def _remove_orphans(store: Store, domain: Domain, oldest: float) -> list[Removed]:
    """Objects that no manifest names: what a crash of eviction, or a replaced manifest, left."""
    with _bin(store) as bin_folder:
        with store.structure(exclusive=True):
            named = _named_objects(domain)
            orphans = [f for f in domain.objects() if f.id not in named and _old(f.path, oldest)]
            moved = [folder.id for folder in orphans if _move_object(folder, bin_folder)]
            sync_dir(domain.path / "objects")
        return [
            Removed("leftover", domain.name, i, (), _freed(bin_folder / i), 1, "no snapshot needs it")
            for i in moved
        ]


def _sweep_temporaries(domain: Domain, oldest: float) -> None:
    """Files of writes that were cut short, and repairs beside a complete object."""
    for folder in domain.objects():
        if not _old(folder.path, oldest):
            continue
        _sweep_folder(folder.path, oldest)
        if folder.complete and folder.partial.exists():
            fd = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                if locks.try_lock(fd, WHOLE, 2, exclusive=True):
                    folder.partial.unlink(missing_ok=True)
            finally:
                os.close(fd)
    for snapshot in domain.snapshots():
        for path, folders, _ in os.walk(snapshot.path):
            folders.sort()
            _sweep_folder(Path(path), oldest)


def _sweep_folder(folder: Path, oldest: float) -> None:
    for entry in folder.glob(f"{TEMPORARY}*"):
        if _old(entry, oldest):
            entry.unlink(missing_ok=True)


def _old(path: Path, oldest: float) -> bool:
    try:
        return path.stat().st_ctime < oldest
    except FileNotFoundError:
        return False


# -- what belongs to whom


def _object_ids(domain: Domain, snapshot: Snapshot) -> set[str]:
    """The objects that a snapshot's manifest names; none when it is damaged or gone."""
    try:
        content = snapshot.manifest()
    except (NotStaged, ManifestError):
        return set()
    return {content.object_id(domain.name, file) for file in content.files}


def _named_objects(domain: Domain) -> set[str]:
    return {i for snapshot in domain.snapshots() for i in _object_ids(domain, snapshot)}


def _names(snapshot: Snapshot) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(name.reference for name in snapshot.names()))
    except FileNotFoundError:
        # Evicted by another process meanwhile.
        return ()


# -- the trash


@contextmanager
def _bin(store: Store) -> Iterator[Path]:
    """A folder in the trash, deleted at the end; what a killed process leaves, the next sweep deletes."""
    folder, fd = claim_folder(store.trash)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(fd)


def _freed(folder: Path) -> int:
    """Bytes of the inodes that have all their links below `folder`."""
    return sum(size for size, links, seen in _inodes(folder).values() if seen >= links)


def _inodes(folder: Path) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(bytes on disk, links, links seen) of every file below `folder`, by inode."""
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                status = os.stat(os.path.join(path, name), follow_symlinks=False)
            except FileNotFoundError:
                continue
            key = (status.st_dev, status.st_ino)
            seen = found[key][2] if key in found else 0
            found[key] = (status.st_blocks * 512, status.st_nlink, seen + 1)
    return found
