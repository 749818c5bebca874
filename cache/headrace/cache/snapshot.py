"""Snapshots: one revision in one store.

::

    snapshots/<id>/manifest.json   what belongs to it; replaced whole
                  /files/<path>    hard links to complete objects' data: what a pod mounts
                  /hold            readers hold a shared flock on it
                  /names/<digest>  a reference that resolved to it, and when
                  /pin, /used      why it must stay; when it was last used (mtime)

Crash story. The folder is built under `tmp/` and renamed. `link` builds `files` under `tmp/` and
renames it once, after every object is complete: a crash before leaves nothing in the snapshot, after
it everything. A link that no longer is its object's inode (a repair cut short) is replaced by `relink`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.cache import locks, manifest
from headrace.cache.digest import identity
from headrace.cache.durable import TEMPORARY, make_dirs, sync_dir, write_file
from headrace.cache.errors import NotStaged
from headrace.cache.manifest import Manifest

_HOLD_WAIT = 5.0


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a reference were asked for: glob patterns; () means the default."""

    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Name:
    """A reference that resolved to a snapshot, at `resolved` (seconds since the epoch)."""

    reference: str
    selection: Selection
    resolved: float


class Snapshot:
    """The folder of one snapshot."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.id = folder.name
        self.files = folder / "files"
        self.hold_file = folder / "hold"
        self._manifest_file = folder / "manifest.json"
        self._names = folder / "names"
        self._pin = folder / "pin"
        self._used = folder / "used"

    @property
    def complete(self) -> bool:
        """Staged: every byte is present and verified."""
        return self.files.exists()

    def manifest(self) -> Manifest:
        """Raises NotStaged when the snapshot is gone, ManifestError when it is damaged."""
        try:
            data = self._manifest_file.read_bytes()
        except FileNotFoundError:
            raise NotStaged(f"the snapshot {self.id[:12]} is not in this store: stage it.") from None
        return manifest.parse(data, str(self._manifest_file))

    def replace_manifest(self, newer: Manifest) -> None:
        """The same files, known better: newer pins, or published digests."""
        write_file(self._manifest_file, newer.to_stored())

    def link(self, data: Mapping[str, Path], tmp: Path) -> None:
        """Show the files under their names; `data` gives each path's complete object file."""
        if self.complete:
            return
        build = tmp / f"files-{uuid.uuid4().hex}"
        build.mkdir(mode=0o755)
        folders = {build}
        for path, source in data.items():
            target = build / path
            make_dirs(target.parent)
            folders.update(p for p in target.parents if build in p.parents)
            link_or_copy(source, target)
        for folder in folders:
            sync_dir(folder)
        build.chmod(0o755)
        try:
            os.rename(build, self.files)
        except OSError as error:
            shutil.rmtree(build, ignore_errors=True)
            # Another stager linked the same files first.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync_dir(self.path)

    def relink(self, data: Mapping[str, Path]) -> list[str]:
        """Replace every link that is not its object's inode; the paths that were replaced."""
        replaced = []
        for path, source in data.items():
            target = self.files / path
            if target.exists() and os.path.samefile(target, source):
                continue
            make_dirs(target.parent)
            # Not below `files`: what a killed process leaves must not be shown.
            fresh = self.path / f"{TEMPORARY}{uuid.uuid4().hex}"
            link_or_copy(source, fresh)
            os.rename(fresh, target)
            sync_dir(target.parent)
            replaced.append(path)
        return replaced

    def names(self) -> Iterator[Name]:
        if not self._names.is_dir():
            return
        for entry in sorted(self._names.iterdir()):
            if not entry.name.startswith("."):
                yield _read_name(entry)

    def name_for(self, reference: str, selection: Selection) -> Name | None:
        """When `reference` last resolved to this snapshot, if it did."""
        try:
            return _read_name(self._names / _name_key(reference, selection))
        except FileNotFoundError:
            return None

    def add_name(self, reference: str, selection: Selection, resolved: float | None = None) -> None:
        make_dirs(self._names)
        name = {
            "reference": reference,
            "include": selection.include,
            "ignore": selection.ignore,
            "resolved": time.time() if resolved is None else resolved,
        }
        write_file(self._names / _name_key(reference, selection), json.dumps(name).encode())

    @property
    def pinned(self) -> str | None:
        """Why the snapshot is pinned, or None."""
        try:
            return self._pin.read_text()
        except FileNotFoundError:
            return None

    def pin(self, reason: str) -> None:
        write_file(self._pin, reason.encode())

    def unpin(self) -> None:
        self._pin.unlink(missing_ok=True)
        sync_dir(self.path)

    @property
    def last_used(self) -> float:
        """Seconds since the epoch."""
        try:
            return self._used.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def touch_used(self) -> None:
        self._used.touch(mode=0o644)

    def hold(self) -> int | None:
        """A descriptor that keeps the snapshot from eviction until closed; None if it was evicted.

        Works through a read-only mount; dies with the process. While an evictor decides, which takes
        milliseconds, this waits for it.
        """
        deadline = time.monotonic() + _HOLD_WAIT
        while True:
            try:
                fd = os.open(self.hold_file, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            locked = locks.try_flock(fd, exclusive=False)
            if locked and locks.same_inode(fd, self.hold_file):
                return fd
            os.close(fd)
            if locked or time.monotonic() > deadline:
                return None
            time.sleep(0.001)


def create(folder: Path, content: Manifest, tmp: Path) -> Snapshot:
    """Make the snapshot's folder unless it exists."""
    snapshot = Snapshot(folder)
    if folder.exists():
        return snapshot
    build = tmp / f"snapshot-{uuid.uuid4().hex}"
    build.mkdir(mode=0o755)
    write_file(build / "manifest.json", content.to_stored())
    for name in ("hold", "used"):
        os.close(os.open(build / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        (build / name).chmod(0o644)
    build.chmod(0o755)
    try:
        os.rename(build, folder)
    except OSError as error:
        shutil.rmtree(build, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    sync_dir(folder.parent)
    return snapshot


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link inside the store; where the file system allows no more (EMLINK), a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _name_key(reference: str, selection: Selection) -> str:
    return identity("name", reference, "include", *selection.include, "ignore", *selection.ignore)[:32]


def _read_name(path: Path) -> Name:
    stored = json.loads(path.read_bytes())
    selection = Selection(tuple(stored["include"]), tuple(stored["ignore"]))
    return Name(stored["reference"], selection, stored["resolved"])
