"""Where a chunk can come from: this disk, a peer, the origin; cheapest first.

The stager asks each source in turn. Peers and the tracker take their place between the two sources
that exist on one node.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

from headrace.cache.errors import StoreError
from headrace.cache.manifest import ManifestFile
from headrace.cache.origins import RetryingOrigin
from headrace.cache.reuse import LocalChunks
from headrace.cache.threads import to_its_end

if TYPE_CHECKING:
    from typing_extensions import Buffer

Put = Callable[["Buffer"], None]
"""Takes the next bytes, in a thread; they may change once it has returned."""


class ChunkSource(Protocol):
    """One kind of source. `name` is a key of `Progress.fetched`."""

    @property
    def name(self) -> str: ...

    def has(self, file: ManifestFile, index: int) -> bool:
        """Whether it is worth asking this source for a chunk. Quick, without I/O."""
        ...

    async def read_to(self, file: ManifestFile, first: int, last: int, put: Put, pool: Executor) -> None:
        """Call `put` in threads, of `pool` or its own, with the bytes of the chunks [first, last), in order.

        They are not yet verified. Cancelled, it returns when nothing is put any more.

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

    async def read_to(self, file: ManifestFile, first: int, last: int, put: Put, pool: Executor) -> None:
        def copy() -> None:
            for index in range(first, last):
                digest = bytes.fromhex(file.chunks[index]) if file.chunks is not None else b""
                location = self._chunks.find(file.grid.lengths[index], digest)
                data = None if location is None else self._chunks.read(location)
                if data is None:
                    raise StoreError(f"the local copy of chunk {index} of {file.path!r} is gone.")
                put(data)

        await to_its_end(pool, copy)


class OriginSource:
    """The origin itself: always has everything."""

    name = "origin"

    def __init__(self, origin: RetryingOrigin) -> None:
        self._origin = origin

    def has(self, file: ManifestFile, index: int) -> bool:
        return True

    async def read_to(self, file: ManifestFile, first: int, last: int, put: Put, pool: Executor) -> None:
        await self._origin.read_to(file.origin_file(), *file.grid.span(first, last), put, pool)
