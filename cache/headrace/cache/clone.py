"""Copies of files: shared blocks where the file system can (reflink), else bytes moved by the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from headrace.cache import disk
from headrace.cache.errors import NoSpace, StoreError

# ioctl_ficlonerange(2): FICLONE is _IOW(0x94, 9, int).
_FICLONE = 0x40049409
_BLOCK = 8 << 20
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS)
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def reflink(source: int, target: int) -> bool:
    """Make `target` share all blocks of `source`; False where the file systems cannot.

    Raises:
        OSError: it could, and failed (ENOSPC, EIO).
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def copy_range(source: int, target: int, start: int, stop: int) -> None:
    """Copy the bytes [start, stop) to the same place in `target`.

    Holes come out as zeros or holes; either way the bytes are equal.

    Raises:
        OSError: the file system refused; StoreError: `source` ends before `stop`.
    """
    kernel = True
    while start < stop:
        length = min(_BLOCK, stop - start)
        if kernel:
            try:
                moved = os.copy_file_range(source, target, length, start, start)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                moved = 0
            # Some file systems say 0 instead of refusing: then, and at a real end, the slow way decides.
            kernel = moved > 0
        else:
            moved = _move(source, target, start, length)
        start += moved


def _move(source: int, target: int, start: int, length: int) -> int:
    data = os.pread(source, length, start)
    if not data:
        raise StoreError(f"a file ended at byte {start} while it was copied: run `headrace verify`.")
    view = memoryview(data)
    done = 0
    while done < len(data):
        done += os.pwrite(target, view[done:], start + done)
    return done


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse before the first byte what would not fit.

    Raises:
        NoSpace: how many bytes are missing on the file system of `folder`.
    """
    free = disk.free_bytes(folder)
    if needed > free:
        raise NoSpace(
            f"{str(folder)!r} has too little space for {what}: {needed - free} bytes are missing; "
            f"free them there, then repeat.",
            needed - free,
        )
