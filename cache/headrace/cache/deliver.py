"""Deliver: make a staged snapshot's files appear in a directory of the user's.

Blocks are shared where the file system can (reflink), else copied; never hard-linked, because what the
user writes there must not reach the store. Serves `stage SRC DST` (the argument order and outcome of
KServe's storage initializer) and `export`.

Crash story. Each file is written beside its name, synced and renamed: under its name it is absent, as
it was, or whole. What a killed run left beside it is removed by the next one, which a flock on it tells
from a running one. Files that have the right bytes already are compared and left alone.
"""

from __future__ import annotations

import errno
import filecmp
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cache import clone, disk, locks
from headrace.cache.durable import sync_dir
from headrace.cache.errors import NoSpace, NotStaged, StoreError, UnsafePath, UsageError
from headrace.cache.manifest import ManifestFile
from headrace.cache.snapshot import Snapshot

_TEMPORARY = ".headrace-deliver-"
_THREADS = 4
_BLOCK = 64 << 20


@dataclass(frozen=True, slots=True)
class DeliverReport:
    """What was delivered where; bytes by how they got there."""

    snapshot: str
    path: str
    files: int
    bytes: int
    reflinked: int
    copied: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class _Delivery:
    """One file's outcome: "reflinked", "copied" or "unchanged"."""

    how: str
    bytes: int


def deliver(
    snapshot: Snapshot,
    destination: Path | str,
    *,
    progress: Callable[[int], None] | None = None,
) -> DeliverReport:
    """Make every file of a complete snapshot appear below `destination`, 0644 in 0755 folders.

    The directory is made when missing; other files in it are left alone.

    Args:
        progress: called with the bytes just delivered, from any thread.

    Raises:
        NotStaged: the snapshot is not complete.
        UsageError: the destination is a file, or inside the store, or something there is in the way.
        UnsafePath: a link in the destination leads out of it.
        NoSpace: says how much is missing; what was delivered before stays.
        StoreNotWritable: the destination is read-only, or another user's.
    """
    hold = snapshot.hold()
    if hold is None:
        raise NotStaged(f"the snapshot {snapshot.id[:12]} is not in this store: stage it.")
    target = Path(os.path.abspath(destination))
    try:
        if not snapshot.complete:
            raise NotStaged(f"the snapshot {snapshot.id[:12]} is not complete: stage it first.")
        _check_destination(snapshot, target)
        with _translated(target):
            target.mkdir(parents=True, exist_ok=True)
            return _deliver(snapshot, target, progress or (lambda _: None))
    finally:
        os.close(hold)


def export(
    snapshot: Snapshot, destination: Path | str, *, progress: Callable[[int], None] | None = None
) -> DeliverReport:
    """Write a snapshot out into a directory that is new or empty, so that it holds nothing else.

    Raises:
        UsageError: the directory holds something; else as `deliver`.
    """
    target = Path(os.path.abspath(destination))
    if target.is_dir() and any(not e.name.startswith(_TEMPORARY) for e in target.iterdir()):
        raise UsageError(
            f"{str(target)!r} is not empty: export into a new directory, or use `headrace stage` with a destination."
        )
    return deliver(snapshot, target, progress=progress)


def _check_destination(snapshot: Snapshot, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{str(target)!r} is a file: give a directory.")
    root = snapshot.path.resolve()
    for _ in range(4):  # <root>/domains/<domain>/snapshots/<id>
        root = root.parent
    if root in (resolved := target.resolve(), *resolved.parents):
        raise UsageError(
            f"{str(target)!r} lies inside the store {str(root)!r}: deliver to a place outside of it."
        )


def _deliver(snapshot: Snapshot, target: Path, progress: Callable[[int], None]) -> DeliverReport:
    files = snapshot.manifest().files
    folders = {target}
    for file in files:
        folders |= _make_parents(target, file.path)
    for folder in folders:
        _sweep(folder)
    todo = []
    unchanged = 0
    with ThreadPoolExecutor(_THREADS, "headrace-deliver") as pool:
        same = pool.map(lambda f: _unchanged(snapshot.files / f.path, target / f.path, f), files)
        for file, equal in zip(files, same, strict=True):
            if equal:
                unchanged += file.size
                progress(file.size)
            else:
                todo.append(file)
        _check_room(snapshot, target, todo)
        done = list(pool.map(lambda f: _place(snapshot.files / f.path, target / f.path, f, progress), todo))
    for folder in folders:
        sync_dir(folder)
    reflinked = sum(d.bytes for d in done if d.how == "reflinked")
    copied = sum(d.bytes for d in done if d.how == "copied")
    size = sum(f.size for f in files)
    return DeliverReport(snapshot.id, str(target), len(files), size, reflinked, copied, unchanged)


def _make_parents(target: Path, path: str) -> set[Path]:
    """Make the folders of a file; every folder between the destination and it."""
    made: set[Path] = set()
    folder = target
    for name in path.split("/")[:-1]:
        folder = folder / name
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{str(folder)!r} is a file where the model has a folder: move it away.")
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        if target.resolve() not in folder.resolve().parents:
            raise UnsafePath(f"{str(folder)!r} is a link that leads out of {str(target)!r}: remove it.")
        made.add(folder)
    if (target / path).is_dir():
        raise UsageError(f"{str(target / path)!r} is a folder where the model has a file: move it away.")
    return made


def _sweep(folder: Path) -> None:
    """Remove what killed runs left; a running one holds a flock on its own."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        try:
            fd = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if locks.try_flock(fd, exclusive=True):
                entry.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _unchanged(source: Path, target: Path, file: ManifestFile) -> bool:
    # Times may lie and a link is not a copy: only equal bytes in a file of its own count.
    try:
        status = os.stat(target, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if target.is_symlink() or status.st_size != file.size or os.path.samestat(status, source.stat()):
        return False
    return filecmp.cmp(source, target, shallow=False)


def _check_room(snapshot: Snapshot, target: Path, todo: list[ManifestFile]) -> None:
    """Before the first byte, unless blocks can be shared."""
    probe = next((f for f in todo if f.size), None)
    if probe is None:
        return
    source = os.open(snapshot.files / probe.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _temporary(target / probe.path) as (fd, _):
            if clone.reflink(source, fd):
                return
    finally:
        os.close(source)
    clone.check_room(target, sum(f.size for f in todo), f"the snapshot {snapshot.id[:12]}")


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside `target`, held by a flock and removed at the end if it was not renamed."""
    path = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        locks.try_flock(fd, exclusive=True)
        yield fd, path
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _place(source: Path, target: Path, file: ManifestFile, progress: Callable[[int], None]) -> _Delivery:
    origin = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _temporary(target) as (fd, path):
            shared = clone.reflink(origin, fd)
            if shared:
                progress(file.size)
            else:
                disk.allocate(fd, file.size)
                for start in range(0, file.size, _BLOCK):
                    stop = min(start + _BLOCK, file.size)
                    clone.copy_range(origin, fd, start, stop)
                    progress(stop - start)
            if os.fstat(fd).st_size != file.size:
                raise StoreError(f"{file.path!r} in the store has the wrong size: run `headrace verify`.")
            os.fchmod(fd, 0o644)
            os.fsync(fd)
            os.rename(path, target)
    finally:
        os.close(origin)
    return _Delivery("reflinked" if shared else "copied", file.size)


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{str(target)!r} is full: free space there, or choose another destination, then repeat."
            ) from error
        raise disk.translated(error, target, "delivering files") from error
