"""Where a loader's files come from: a directory, a single file, or a snapshot that may still be filling.

`headrace.cache` implements the same protocols for its store; the loader asks for no more than this.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from headrace.cache.errors import CheckpointError, LoadError, NotFound, UnsafePath


class SourceFile(Protocol):
    """One file of a model, complete or still filling.

    Bytes may be read from `fileno()` only where `ready` said yes. The descriptor stays good when the file
    completes: its inode survives.
    """

    path: str
    """Relative POSIX path within the model."""
    size: int
    """Final size in bytes, known from the start."""

    def fileno(self) -> int: ...

    @property
    def complete(self) -> bool:
        """Every byte is present and verified."""
        ...

    def ready(self, start: int, stop: int) -> bool:
        """Whether every byte of [start, stop) is present and verified. Cheap: readers ask often."""
        ...

    def wait(self, start: int, stop: int, timeout: float | None = None) -> None:
        """Ask for [start, stop) to be staged first, and return when it is ready or `timeout` seconds passed.

        Raises:
            StagingStopped: nobody stages any more, and the bytes are not here.
        """
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """A model: named files."""

    name: str
    """For messages: the reference or path the user gave."""
    snapshot: str | None
    """The snapshot id, where there is one."""

    def paths(self) -> tuple[str, ...]:
        """All files, as sorted relative POSIX paths."""
        ...

    def open(self, path: str) -> SourceFile: ...

    def close(self) -> None: ...


class LocalFile:
    """An ordinary file: complete, and trusted as it is."""

    def __init__(self, location: Path, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{location} does not exist: check the path") from error
        except OSError as error:
            raise LoadError(f"{location} cannot be opened: {error.strerror or error}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            self._descriptor = -1
            raise CheckpointError(f"{location} is not a file: give a directory or a .safetensors file")
        self.size = status.st_size

    def fileno(self) -> int:
        return self._descriptor

    @property
    def complete(self) -> bool:
        return True

    def ready(self, start: int, stop: int) -> bool:
        return True

    def wait(self, start: int, stop: int, timeout: float | None = None) -> None:
        return None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DirectorySource:
    """A directory with a model, one .safetensors file, or one index file and the shards it names.

    Links are followed, as a Hugging Face cache needs.

    Attributes:
        only: the file's name where a single file (or index) was given, else None.
        folder: where the files lie.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        given = Path(location)
        if not given.exists():
            raise NotFound(f"{given} does not exist: check the path")
        self.name = str(given)
        self.snapshot: str | None = None
        self.only = None if given.is_dir() else given.name
        self._root = given if given.is_dir() else given.parent
        self.folder: Path | None = self._root

    def paths(self) -> tuple[str, ...]:
        found: list[str] = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = Path(folder).relative_to(self._root)
            found += [(relative / name).as_posix() for name in files]
        return tuple(sorted(found))

    def open(self, path: str) -> LocalFile:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UnsafePath(f"{self.name} has no file {path!r}: paths must lead inside it")
        return LocalFile(self._root / path, path)

    def close(self) -> None:
        """Nothing to release; opened files are closed one by one."""
