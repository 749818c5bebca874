"""File systems: what lies under a path, how much room it has, and their errors as ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.errors import NoSpace, StoreError, StoreNotWritable, UnsuitableFilesystem

# OFD locks, shared maps and durability hold only on a file system of this kernel.
_REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "glusterfs", "afs", "9p", "beegfs"}
    | {"orangefs", "ocfs2", "gfs2", "virtiofs"}
)


@dataclass(frozen=True, slots=True)
class Filesystem:
    """The mount that holds a path: its type ("ext4", "xfs", ...) and mount point."""

    kind: str
    mount_point: str


def filesystem(path: Path) -> Filesystem:
    """The file system of the nearest existing ancestor of `path` (proc(5), mountinfo)."""
    while not path.exists():
        path = path.parent
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best = Filesystem("unknown", "/")
    resolved = f"{path.resolve()}/"
    fallback = best
    with open("/proc/self/mountinfo") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            parts = fields.split()
            point = parts[4].encode().decode("unicode_escape")
            entry = Filesystem(rest.split()[0], point)
            if parts[2] == wanted:
                best = entry
            # btrfs and overlay may report another device number than their mount line.
            if resolved.startswith(f"{point.rstrip('/')}/") and len(point) >= len(fallback.mount_point):
                fallback = entry
    return best if best.kind != "unknown" else fallback


def check_suitable(path: Path) -> None:
    """Refuse network and FUSE file systems as a store.

    Raises:
        UnsuitableFilesystem: with its type and mount point.
    """
    found = filesystem(path)
    if found.kind in _REMOTE or found.kind.startswith("fuse"):
        raise UnsuitableFilesystem(
            f"the store {str(path)!r} would lie on {found.kind} (mounted at {found.mount_point}), where locks and "
            f"durability do not hold: choose a local disk with --root or HEADRACE_ROOT."
        )


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of `path`."""
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a full disk shows now and not midway.

    File systems without fallocate fall back to a sparse file. Raises OSError (ENOSPC) when full.
    """
    if size == 0:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


@contextmanager
def translate(path: Path, doing: str) -> Iterator[None]:
    """Turn a file system's refusal into one clear sentence; the only place where that happens.

    Raises:
        NoSpace, StoreNotWritable, StoreError.
    """
    try:
        yield
    except OSError as error:
        raise translated(error, path, doing) from error


def translated(error: OSError, path: Path, doing: str) -> StoreError:
    """The error of ours for a file system's refusal while `doing` something at `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"no space left while {doing} in {str(path)!r}: free some with `headrace gc`, then repeat."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreNotWritable(
            f"{str(path)!r} cannot be written while {doing} ({reason}): check its owner and mount."
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StoreError(f"too many open files while {doing} in {str(path)!r}: raise the limit (ulimit -n).")
    return StoreError(f"the disk failed while {doing} in {str(path)!r}: {reason}.")
