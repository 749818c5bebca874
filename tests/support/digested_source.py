"""A folder whose files have chunk digests, as a store's have, on any grid; and its bytes can be damaged."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from headrace.cache.digest import Hasher, chunk_digest, hasher
from headrace.cache.grid import Grid
from headrace.loader.source import LocalFile


class DigestedFile(LocalFile):
    """One file; `notes` has what the loader wanted to be noted."""

    def __init__(
        self, location: Path, path: str, digests: list[bytes | None], source: DigestedSource
    ) -> None:
        super().__init__(location, path)
        self._source = source
        self._digests = digests

    @property
    def grid(self) -> Grid:
        return self._source.grids[self.path]

    def has_digests(self) -> bool:
        return self._source.readable

    def hasher(self) -> Hasher:
        return hasher(self._source.algorithm)

    def digest(self, index: int) -> bytes | None:
        return self._digests[index]

    def verified(self) -> Literal["this boot", "earlier boot", "never", "unknown"]:
        return self._source.last

    def note_verified(self, *, good: bool) -> None:
        self._source.notes.append((self.path, good))


class DigestedSource:
    """Files by path, each with a grid.

    Attributes:
        last: when every file was last verified, as the store would say.
        readable: whether this process may read the digests.
        notes: (path, good) of each `note_verified`.
    """

    snapshot: str | None = None

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        grids: Mapping[str, Grid],
        algorithm: str = "xxh3-128",
    ) -> None:
        self.name = "digested"
        self.grids = dict(grids)
        self.algorithm = algorithm
        self.last: Literal["this boot", "earlier boot", "never", "unknown"] = "this boot"
        self.readable = True
        self.notes: list[tuple[str, bool]] = []
        self.digests: dict[str, list[bytes | None]] = {}
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (folder / path).write_bytes(content)
            offsets = self.grids[path].offsets
            self.digests[path] = [
                chunk_digest(algorithm, content[start:stop]) for start, stop in itertools.pairwise(offsets)
            ]

    def damage(self, path: str, offset: int) -> None:
        """Flip a bit, again to undo it."""
        fd = os.open(self._folder / path, os.O_RDWR)
        try:
            byte = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self.grids))

    def open(self, path: str) -> DigestedFile:
        return DigestedFile(self._folder / path, path, self.digests[path], self)

    def close(self) -> None:
        """Nothing to release; opened files are closed one by one."""
