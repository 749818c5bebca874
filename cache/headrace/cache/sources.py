"""Where a chunk can come from: this disk, a peer, the origin; cheapest first.

The stager asks each source in turn. Peers and the tracker take their place between the two sources
that exist on one node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from headrace.cache.errors import StoreError
from headrace.cache.manifest import ManifestFile
from headrace.cache.origins.protocol import Origin
from headrace.cache.reuse import LocalChunks

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ChunkSource(Protocol):
    """One kind of source. `name` is a key of `Progress.fetched`."""

    @property
    def name(self) -> str: ...

    def has(self, file: ManifestFile, index: int) -> bool:
        """Whether it is worth asking this source for a chunk. Quick, without I/O."""
        ...

    def read(self, file: ManifestFile, first: int, last: int) -> AsyncIterator[Buffer]:
        """The bytes of the chunks [first, last), in order; not yet verified.

        Raises:
            HeadraceError: it cannot give them; the next source is asked.
        """
        ...


class LocalSource:
    """Chunks of other objects on this disk, by published digest."""

    name = "local"

    def __init__(self, chunks: LocalChunks) -> None:
        self._chunks = chunks

    def has(self, file: ManifestFile, index: int) -> bool:
        if file.chunks is None:
            return False
        return self._chunks.find(file.grid.lengths[index], bytes.fromhex(file.chunks[index])) is not None

    async def read(self, file: ManifestFile, first: int, last: int) -> AsyncIterator[Buffer]:
        for index in range(first, last):
            digest = bytes.fromhex(file.chunks[index]) if file.chunks is not None else b""
            location = self._chunks.find(file.grid.lengths[index], digest)
            data = None if location is None else await asyncio.to_thread(self._chunks.read, location)
            if data is None:
                raise StoreError(f"the local copy of chunk {index} of {file.path!r} is gone.")
            yield data


class OriginSource:
    """The origin itself: always has everything."""

    name = "origin"

    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    def has(self, file: ManifestFile, index: int) -> bool:
        return True

    def read(self, file: ManifestFile, first: int, last: int) -> AsyncIterator[Buffer]:
        return self._origin.read(file.origin_file(), *file.grid.span(first, last))
