"""The direct read path: O_DIRECT, from the device straight into private memory, around the page cache.

The fastest way to bytes that are not in memory, at a fraction of the CPU time. The threads of the transfer
read blocks of 8 MiB each with preadv(2); io_uring was not faster (docs/decisions/0005-read-paths.md).

The descriptor is a second one of the same file, opened through /proc: the source's own belongs to others too,
and O_DIRECT is a property of the open file. Bytes that the page cache has are read again from the device.
Never for a file that is still being written: each read would first force what is being written to the disk.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar

from headrace.loader.plan import PAGE
from headrace.loader.readers.fetch import became_shorter, unreadable
from headrace.loader.source import SourceFile

# What a file system may answer to an alignment it cannot serve, or to O_DIRECT as such.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectRefusedError(Exception):
    """O_DIRECT does not work on this file; the text, which fits after "because", says why."""


class DirectFetch:
    """Reads one complete file with O_DIRECT.

    Raises:
        DirectRefusedError: it cannot be opened that way. `bring` raises it when the first read shows it.
    """

    name: ClassVar[str] = "direct"

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        if not file.complete:
            raise DirectRefusedError("it is still being written")
        try:
            self._descriptor = os.open(
                f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
            )
        except OSError as error:
            raise DirectRefusedError(
                f"it cannot be opened for direct reads ({error.strerror or error})"
            ) from error

    def bring(self, pages: memoryview, start: int, stop: int) -> None:
        begin = start // PAGE * PAGE
        wanted = stop - begin
        done = 0
        while done < wanted:
            try:
                count = os.preadv(self._descriptor, [pages[done:]], begin + done)
            except OSError as error:
                if error.errno in _REFUSALS:
                    raise DirectRefusedError(
                        f"its file system refuses direct reads ({error.strerror})"
                    ) from error
                raise unreadable(self._file, begin + done, error) from error
            if done + count >= wanted:
                return
            # A read that ends early ends at the file's end, or on a page: go on from the page it began.
            whole = count // PAGE * PAGE
            if not whole:
                raise became_shorter(self._file)
            done += whole

    def outcome(self) -> str:
        return ""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
