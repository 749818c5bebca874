"""The one way small state reaches the disk: temporary file, fsync, rename, fsync of the folder.

A crash before the rename leaves the old content and a temporary file, which `Store.sweep` removes;
a crash after it leaves the new content. There is no state in between.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

TEMPORARY = ".tmp-"


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`, durably and atomically."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make a folder's entries durable. File systems that cannot (EINVAL) are let be; EIO is not."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def make_dirs(path: Path, mode: int = 0o755) -> None:
    """Create a folder and its parents, each durable, whatever the umask."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        # Twice: a crash in between must not leave more than `mode` allows; umask may take some away.
        folder.mkdir(mode, exist_ok=True)
        folder.chmod(mode)
        sync_dir(folder.parent)
