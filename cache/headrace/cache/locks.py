"""Kernel locks that die with their holder.

Open-file-description locks (fcntl(2), "Open file description locks") belong to an open file, not to
a process or thread: each stager opens its own descriptor and never hands it through a fork.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

# struct flock: type, whence, start, length, pid (0 for open-file-description locks), padded.
_FLOCK = struct.Struct("@hhqqi0q")
_BUSY = (errno.EAGAIN, errno.EACCES)


def _flock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def try_lock(fd: int, start: int, length: int, *, exclusive: bool) -> bool:
    """Lock the bytes [start, start + length) of `fd` at once, or return False."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, start, length))
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True


def unlock(fd: int, start: int, length: int) -> None:
    """Give bytes up; what was not locked is ignored."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, start, length))


def lock(fd: int, start: int, length: int, *, exclusive: bool, timeout: float | None = None) -> bool:
    """Lock, polling at most every 20 ms; False when `timeout` seconds ran out."""
    deadline = None if timeout is None else time.monotonic() + timeout
    delay = 0.0005
    while not try_lock(fd, start, length, exclusive=exclusive):
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(delay)
        delay = min(delay * 2, 0.02)
    return True


def is_locked(fd: int, start: int, length: int) -> bool:
    """Whether another open file holds any lock on the bytes; needs no write permission."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def try_flock(fd: int, *, exclusive: bool) -> bool:
    """Take the whole-file flock(2) at once, or return False. Works through read-only mounts."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def same_inode(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether `path` still names the file that `fd` has open."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))
