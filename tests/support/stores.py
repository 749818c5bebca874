"""Stores looked into from outside: an opened snapshot, its object files, and bytes changed behind its back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.object import ObjectFolder
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain, Store


@dataclass(frozen=True)
class Opened:
    """A store with one of its snapshots."""

    store: Store
    domain: Domain
    snapshot: Snapshot

    def object_of(self, path: str) -> ObjectFolder:
        content = self.snapshot.manifest()
        return self.domain.object(content.object_id(self.domain.name, content.by_path[path]))

    def data_of(self, path: str) -> Path:
        return self.object_of(path).data

    def link(self, path: str) -> Path:
        return self.snapshot.files / path


@contextmanager
def opened(root: Path, snapshot: str, *, writable: bool = True) -> Iterator[Opened]:
    """The snapshot of that id in the store at `root`."""
    with Store.open(root, writable=writable) as store:
        domain = store.domain()
        yield Opened(store, domain, domain.snapshot(snapshot))


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, offset: int) -> None:
    """Change one byte of a published file in place, as a failing disk would; its inode stays."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 0xFF]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
        path.chmod(mode & 0o7777)


def disk_usage(*folders: Path) -> int:
    """Bytes on disk below the folders, each inode once."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            if path.is_file():
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())
