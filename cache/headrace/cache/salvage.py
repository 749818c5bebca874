"""Where a chunk that must be had again can still be found: on this disk, at its origin, by another name."""

from __future__ import annotations

from types import TracebackType
from typing import IO

from headrace.cache import config
from headrace.cache.archive import DERIVED
from headrace.cache.digest import chunk_digest
from headrace.cache.errors import (
    ArchiveError,
    HeadraceError,
    IntegrityError,
    NotFound,
    OriginChanged,
    OriginError,
)
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin, OriginFile
from headrace.cache.reference import REVISION_SCHEMES, Reference, parse
from headrace.cache.reuse import LocalChunks
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain
from headrace.cache.tarball import ArchiveLimits, Unpacked, members

_BLOCK = 8 << 20


def origin_reference(content: Manifest) -> Reference | None:
    """The reference that a stored manifest's pins belong to."""
    if content.uri is None:
        return None
    scheme, _, location = content.uri.partition("://")
    return Reference(scheme, location, content.revision if scheme in REVISION_SCHEMES else None)


class ChunkFinder:
    """Finds chunks of one snapshot; an async context manager, which closes the origins it opened."""

    def __init__(
        self, domain: Domain, snapshot: Snapshot, content: Manifest, options: OriginOptions | None
    ) -> None:
        """
        Args:
            options: of the manifest's own origin; None takes the configuration's.
        """
        self._domain = domain
        self._content = content
        self._options = options
        self._without: set[str] = set()
        self._local: LocalChunks | None = None
        self._origins: dict[Reference, Origin] = {}
        own = origin_reference(content)
        names = [name.reference for name in snapshot.names()]
        self._archives = [n.removeprefix(DERIVED) for n in names if n.startswith(DERIVED)]
        others = [parse(name) for name in names if not name.startswith(DERIVED)]
        self._references = list(dict.fromkeys([*([own] if own else []), *others]))

    async def __aenter__(self) -> ChunkFinder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for origin in self._origins.values():
            await origin.close()

    def distrust(self, objects: set[str]) -> None:
        """Take nothing from these objects."""
        if not objects <= self._without:
            self._without |= objects
            self._local = None

    async def find(self, file: ManifestFile, index: int, expected: bytes | None) -> tuple[bytes, str]:
        """The chunk's bytes, of the digest `expected` if that is known, and "local" or "origin".

        Raises:
            OriginError: the origin lacks them, refuses, or has changed.
            IntegrityError: the origin serves other bytes.
        """
        if expected is not None:
            data = self._on_disk(file, index, expected) or self._from_archive(file, index, expected)
            if data is not None:
                return data, "local"
        first: HeadraceError | None = None
        for reference in self._references:
            try:
                return await self._from_origin(reference, file, index, expected), "origin"
            except HeadraceError as error:
                first = first or error
        if first is None:
            raise NotFound(f"nothing says where {file.path!r} came from: remove it, and stage it again.")
        where = f"chunk {index} of {file.path!r} cannot be had again, and its file stays as it was"
        raise type(first)(f"{where}: {first}") from first

    def _on_disk(self, file: ManifestFile, index: int, expected: bytes) -> bytes | None:
        if self._local is None:
            self._local = LocalChunks(self._domain, self._content.algorithm, self._without)
        location = self._local.find(file.grid.lengths[index], expected)
        data = None if location is None else self._local.read(location)
        if data is None or chunk_digest(self._content.algorithm, data) != expected:
            return None
        return data

    def _from_archive(self, file: ManifestFile, index: int, expected: bytes) -> bytes | None:
        """Out of the archive that the snapshot was extracted from, if that is still here."""
        start, stop = file.grid.span(index, index + 1)
        for archive in map(self._domain.snapshot, self._archives):
            if not archive.complete:
                continue
            (packed,) = archive.manifest().files
            where = f"{archive.id[:12]} ({packed.path})"
            limits = ArchiveLimits()
            try:
                with Unpacked(open(archive.files / packed.path, "rb"), where, limits) as stream:
                    for path, _, content in members(stream, where, limits, lambda: None):
                        if path == file.path and content is not None:
                            _skip(content, start)
                            data = content.read(stop - start)
                            return data if chunk_digest(self._content.algorithm, data) == expected else None
            except ArchiveError:
                # Spoiled too: the origin is asked.
                continue
        return None

    async def _from_origin(
        self, reference: Reference, file: ManifestFile, index: int, expected: bytes | None
    ) -> bytes:
        origin = self._origins.get(reference)
        if origin is None:
            own = reference == self._references[0]
            options = self._options if own and self._options else config.load().options(reference)
            origin = self._origins[reference] = open_origin(reference, options)
        failed: OriginError | None = None
        if reference == origin_reference(self._content) and file.pin is not None:
            try:
                return await self._read(origin, file.origin_file(), file, index, expected)
            except (OriginChanged, NotFound) as error:
                failed = error
        # Another version, or the same bytes by another name: as good, if a digest says so.
        other = None
        if expected is not None or file.digest is not None:
            other = await origin.stat(file.path)
        if other is None or other.size != file.size:
            raise failed or NotFound(f"{origin.uri} has no {file.path!r} of {file.size} bytes.")
        try:
            return await self._read(origin, other, file, index, expected)
        except IntegrityError:
            if failed is not None:
                raise failed from None
            raise

    async def _read(
        self,
        origin: Origin,
        version: OriginFile,
        file: ManifestFile,
        index: int,
        expected: bytes | None,
    ) -> bytes:
        start, stop = file.grid.span(index, index + 1)
        data = b"".join([bytes(piece) async for piece in origin.read(version, start, stop)])
        if len(data) != stop - start or (
            expected is not None and chunk_digest(self._content.algorithm, data) != expected
        ):
            raise IntegrityError(f"{origin.uri}/{file.path}: the origin serves other bytes now.")
        return data


def _skip(content: IO[bytes], size: int) -> None:
    while size > 0 and (block := content.read(min(size, _BLOCK))):
        size -= len(block)
