"""How bytes of one file come into private memory: the interface, and the plain way."""

from __future__ import annotations

import os
import threading
from typing import ClassVar, Protocol

from headrace.cache.errors import LoadError
from headrace.loader.plan import PAGE
from headrace.loader.source import SourceFile


class Fetch(Protocol):
    """Brings ranges of one file into memory; called by several threads at once."""

    @property
    def name(self) -> str:
        """What users call the read path that was taken: buffered, direct or mixed."""
        ...

    def bring(self, pages: memoryview, start: int, stop: int) -> None:
        """Read bytes [start, stop) of the file.

        Args:
            pages: page-aligned memory for whole pages: byte `start` goes to `pages[start % PAGE]`. What lies
                before and after belongs to this range alone, and may be overwritten.

        Raises:
            LoadError: they cannot be read, or the file became shorter.
        """
        ...

    def outcome(self) -> str:
        """What was done, to be added to the sentence that says why; "" where that says it all."""
        ...

    def close(self) -> None: ...


class BufferedFetch:
    """read(2), through the page cache."""

    name: ClassVar[str] = "buffered"

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def bring(self, pages: memoryview, start: int, stop: int) -> None:
        first = start % PAGE
        read_into(self._file, pages[first : first + stop - start], start)

    def outcome(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to release."""


class Tally:
    """Bytes by where they came from, counted by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}

    def add(self, kind: str, count: int) -> None:
        with self._lock:
            self._bytes[kind] = self._bytes.get(kind, 0) + count

    def __getitem__(self, kind: str) -> int:
        return self._bytes.get(kind, 0)


def read_into(file: SourceFile, memory: memoryview, start: int) -> None:
    """Read `len(memory)` bytes from offset `start` of a file.

    Raises:
        LoadError: the file is shorter than it said, or cannot be read.
    """
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file.fileno(), [memory[done:]], start + done)
        except OSError as error:
            raise unreadable(file, start + done, error) from error
        if not count:
            raise became_shorter(file)
        done += count


def unreadable(file: SourceFile, at: int, error: OSError) -> LoadError:
    return LoadError(f"{file.path} cannot be read at byte {at}: {error.strerror or error}")


def became_shorter(file: SourceFile) -> LoadError:
    return LoadError(
        f"{file.path} became shorter than its {file.size} bytes while it was loaded: stage or download it again"
    )
