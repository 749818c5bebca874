"""The store: one directory tree on one file system, written by one user.

::

    <root>/format, lock
    <root>/domains/<trust domain>/objects/<id>/   see `object`
                                 /snapshots/<id>/ see `snapshot`
    <root>/holds/<id>                             one record per published volume, see `holds`
    <root>/tmp/<process>/, trash/                 swept when the store is next opened for writing

`lock` guards the structure: shared while a stager opens what it is about to fill, exclusive while
eviction moves folders to the trash. A process's folder in `tmp/` is held by a flock, so that what a
killed process left is known.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headrace.cache import disk, locks, snapshot
from headrace.cache.durable import TEMPORARY, make_dirs, sync_dir, write_file
from headrace.cache.errors import Held, NotStaged, StoreNotWritable, StoreVersion, UsageError
from headrace.cache.manifest import Manifest
from headrace.cache.object import WHOLE, ObjectFolder
from headrace.cache.paths import check_path
from headrace.cache.snapshot import Name, Selection, Snapshot

FORMAT = 1
DEFAULT_DOMAIN = "default"
NODE_ROOT = Path("/var/lib/headrace")


def default_root(environ: Mapping[str, str] | None = None) -> Path:
    """$HEADRACE_ROOT, else the node's store if this user may write it, else the user's cache folder."""
    environ = os.environ if environ is None else environ
    if environ.get("HEADRACE_ROOT"):
        return Path(environ["HEADRACE_ROOT"])
    # A missing node store is made by whoever may make it: root.
    nearest = NODE_ROOT if NODE_ROOT.exists() else NODE_ROOT.parent
    if os.access(nearest, os.W_OK) and (not NODE_ROOT.exists() or NODE_ROOT.stat().st_uid == os.geteuid()):
        return NODE_ROOT
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headrace"


def may_write(root: Path | str) -> bool:
    """Whether this user may stage into the store at `root`, which need not exist yet."""
    path = Path(root)
    if not (path / "format").exists():
        return True
    return path.stat().st_uid == os.geteuid() and os.access(path, os.W_OK)


class Store:
    """An open store; `close` it, or use it as a context manager."""

    def __init__(self, root: Path, *, writable: bool, lock: int) -> None:
        self.root = root
        self.writable = writable
        self._lock = lock
        self._tmp: tuple[Path, int] | None = None

    @classmethod
    def open(cls, root: Path | str | None = None, *, writable: bool = True) -> Store:
        """Open the store at `root` (default: `default_root`), making it when `writable`.

        Raises:
            NotStaged: there is no store, and none is to be made.
            StoreVersion: written by a newer headrace.
            StoreNotWritable: read-only, or another user's.
            UnsuitableFilesystem: a network or FUSE file system.
            UsageError: the folder holds something else.
        """
        path = Path(os.path.abspath(root or default_root()))
        if not writable and not (path / "format").exists():
            raise NotStaged(f"there is no store at {str(path)!r}: stage something, or name it with --root.")
        if writable:
            disk.check_suitable(path)
            with disk.translate(path, "opening the store"):
                _prepare(path)
        _check_format(path)
        with disk.translate(path, "opening the store"):
            fd = os.open(path / "lock", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        store = cls(path, writable=writable, lock=fd)
        if writable:
            store._sweep()
        return store

    def domain(self, name: str = DEFAULT_DOMAIN) -> Domain:
        """A trust domain's part of the store, made when missing.

        Raises:
            UsageError: a name that cannot be a folder.
        """
        if "/" in check_path(name, "the trust domain") or name.startswith("."):
            raise UsageError(f"{name!r} cannot be a trust domain: use a plain name.")
        folder = self.root / "domains" / name
        if self.writable and not (folder / "snapshots").exists():
            with disk.translate(folder, "making a trust domain"):
                make_dirs(folder, 0o755 if name == DEFAULT_DOMAIN else 0o700)
                make_dirs(folder / "objects")
                make_dirs(folder / "snapshots")
        return Domain(name, folder)

    def domains(self) -> Iterator[Domain]:
        base = self.root / "domains"
        for entry in sorted(base.iterdir()) if base.is_dir() else ():
            # Another tenant's domain is 0700: not ours to list. `snapshots` is made last: without it a
            # killed process has left half of one, which `domain` finishes.
            if os.access(entry, os.R_OK | os.X_OK) and (entry / "snapshots").is_dir():
                yield Domain(entry.name, entry)

    @property
    def tmp(self) -> Path:
        """This process's own folder for what is being built."""
        if self._tmp is None:
            self._tmp = claim_folder(self.root / "tmp")
        return self._tmp[0]

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @contextmanager
    def structure(self, *, exclusive: bool) -> Iterator[None]:
        """Keep eviction away while opening things (shared), or everyone else while evicting."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            locks.lock(fd, 0, 1, exclusive=exclusive)
            yield
        finally:
            os.close(fd)

    def discard(self, folder: ObjectFolder, seen: os.stat_result | None = None) -> None:
        """Move a damaged object's folder to the trash, to be made again; not an error when it is gone.

        Args:
            seen: status of the folder when it was found damaged: one that was made again since stays.

        Raises:
            Held: a stager or a reader has it open.
        """
        bin_folder, claim = claim_folder(self.trash)
        lock = -1
        try:
            with self.structure(exclusive=True):
                if not folder.path.exists() or (seen is not None and not _unchanged(folder.path, seen)):
                    return
                try:
                    lock = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    lock = -1
                if lock >= 0 and not locks.try_lock(lock, WHOLE, 2, exclusive=True):
                    raise Held(
                        f"the object {folder.id[:12]} is in use, so it is not made again now: repeat it later."
                    )
                os.rename(folder.path, bin_folder / folder.id)
                sync_dir(folder.path.parent)
        finally:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(bin_folder)
            os.close(claim)

    def _sweep(self) -> None:
        """Remove what killed processes left in `tmp/` and `trash/`."""
        for base in (self.root / "trash", self.root / "tmp"):
            for entry in base.iterdir():
                try:
                    fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                if locks.try_flock(fd, exclusive=True):
                    shutil.rmtree(entry, ignore_errors=True)
                os.close(fd)

    def close(self) -> None:
        if self._tmp is not None:
            folder, fd = self._tmp
            shutil.rmtree(folder, ignore_errors=True)
            os.close(fd)
            self._tmp = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Domain:
    """One trust domain's objects and snapshots."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder

    def object(self, object_id: str) -> ObjectFolder:
        return ObjectFolder(self.path / "objects" / object_id)

    def objects(self) -> Iterator[ObjectFolder]:
        for entry in sorted((self.path / "objects").iterdir()):
            yield ObjectFolder(entry)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        return Snapshot(self.path / "snapshots" / snapshot_id)

    def snapshots(self) -> Iterator[Snapshot]:
        base = self.path / "snapshots"
        for entry in sorted(base.iterdir()) if base.is_dir() else ():
            yield Snapshot(entry)

    def make_snapshot(self, content: Manifest, tmp: Path) -> Snapshot:
        snapshot_id = content.snapshot_id(self.name)
        return snapshot.create(self.path / "snapshots" / snapshot_id, content, tmp)

    def object_files(self, content: Manifest) -> dict[str, Path]:
        """Each path's complete object file."""
        return {f.path: self.object(content.object_id(self.name, f)).data for f in content.files}

    def has_objects(self, content: Manifest) -> bool:
        """Whether every object is complete. A newer manifest of the same files may cut them otherwise."""
        return all(path.exists() for path in self.object_files(content).values())

    def resolved(
        self, reference: str, selection: Selection, *, complete: bool = False
    ) -> tuple[Snapshot, Name] | None:
        """What `reference` last resolved to, as far as this store remembers; only if `complete` if asked."""
        snapshots = (s for s in self.snapshots() if s.complete or not complete)
        found = [(s, n) for s in snapshots if (n := s.name_for(reference, selection)) is not None]
        return max(found, key=lambda pair: pair[1].resolved, default=None)

    def find(self, text: str) -> Snapshot:
        """A snapshot by its id, a unique prefix of it (4 or more digits), or a reference.

        Raises:
            NotStaged: none, or several.
        """
        if len(text) >= 4 and all(c in "0123456789abcdef" for c in text):
            matches = [s for s in self.snapshots() if s.id.startswith(text)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise NotStaged(f"{text!r} fits {len(matches)} snapshots: give more digits.")
        named = [(n.resolved, s.id, s) for s in self.snapshots() for n in s.names() if n.reference == text]
        if named:
            return max(named)[2]
        raise NotStaged(
            f"{text!r} is not in the store: `headrace ls` shows what is, `headrace stage` brings it."
        )


def _unchanged(folder: Path, seen: os.stat_result) -> bool:
    # The time as well: a file system may give a deleted folder's inode to the next.
    now = folder.stat()
    return os.path.samestat(now, seen) and now.st_mtime_ns == seen.st_mtime_ns


def claim_folder(base: Path) -> tuple[Path, int]:
    """A new folder below `tmp` or `trash`, and a descriptor whose flock keeps the sweep away from it."""
    while True:
        folder = base / uuid.uuid4().hex
        folder.mkdir(mode=0o700)
        # A sweeper may take the folder between any two of these calls.
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if locks.try_flock(fd, exclusive=True) and locks.same_inode(fd, folder):
            return folder, fd
        os.close(fd)


def _prepare(root: Path) -> None:
    """Make the store's folders, or check that they are ours to write."""
    if (root / "format").exists():
        if root.stat().st_uid != os.geteuid():
            raise StoreNotWritable(
                f"the store {str(root)!r} belongs to uid {root.stat().st_uid}, not to this user "
                f"({os.geteuid()}): choose your own with --root or HEADRACE_ROOT."
            )
        if not os.access(root, os.W_OK):
            raise StoreNotWritable(
                f"the store {str(root)!r} is read-only: remount it, or choose another with --root."
            )
        return
    if root.exists() and not root.is_dir():
        raise UsageError(f"{str(root)!r} is a file, not a folder for a store: choose another with --root.")
    if root.exists() and any(not _ours(entry.name) for entry in root.iterdir()):
        raise UsageError(f"{str(root)!r} is not empty and not a headrace store: choose another with --root.")
    make_dirs(root)
    for name, mode in (("domains", 0o755), ("holds", 0o755), ("tmp", 0o700), ("trash", 0o700)):
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    os.close(os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    # Last: a folder without `format` is not yet a store.
    write_file(root / "format", json.dumps({"format": FORMAT}).encode())


def _ours(name: str) -> bool:
    # Another process may be making the same store right now.
    return name in ("domains", "holds", "tmp", "trash", "lock", "format") or name.startswith(TEMPORARY)


def _check_format(root: Path) -> None:
    try:
        found = json.loads((root / "format").read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreVersion(f"the store {str(root)!r} has no readable `format` file ({error}).") from None
    if found != FORMAT:
        raise StoreVersion(
            f"the store {str(root)!r} has the format {found!r}, this headrace knows {FORMAT}: "
            f"upgrade headrace, or choose another store with --root."
        )
