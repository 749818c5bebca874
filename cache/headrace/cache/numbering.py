"""How the chunks of a snapshot are numbered: through all its objects, in the order of the manifest.

Every node numbers the same manifest alike, so a number names a chunk in trackers' bitmaps and between peers.
An object that several files share is numbered once, where its first file stands.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.errors import StoreError
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder
from headrace.cache.store import Domain


@dataclass(frozen=True)
class Numbering:
    """The chunks of one manifest.

    Attributes:
        ids: of its distinct objects, in the order of the manifest.
        files: the first file of each object.
    """

    ids: tuple[str, ...]
    files: tuple[ManifestFile, ...]

    @staticmethod
    def of(manifest: Manifest, domain: str) -> Numbering:
        first: dict[str, ManifestFile] = {}
        for file in manifest.files:
            first.setdefault(manifest.object_id(domain, file), file)
        return Numbering(tuple(first), tuple(first.values()))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each object's first chunk, and the count of all at the end."""
        return tuple(accumulate((len(f.grid) for f in self.files), initial=0))

    @property
    def chunks(self) -> int:
        """How many there are."""
        return self.starts[-1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each chunk."""
        return tuple(length for file in self.files for length in file.grid.lengths)

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Where each object stands among `ids`."""
        return {object_id: at for at, object_id in enumerate(self.ids)}

    def locate(self, number: int) -> tuple[int, int]:
        """A chunk's object (its place among `ids`) and its index in it."""
        # The last that starts there: empty objects before it start there too.
        at = bisect_right(self.starts, number) - 1
        return at, number - self.starts[at]

    def number(self, at: int, index: int) -> int:
        """The number of chunk `index` of the object at place `at`."""
        return self.starts[at] + index

    def bitmap(self, domain: Domain) -> bytes:
        """What of it lies verified in a store, packed (see `pack`)."""
        held: list[int] = []
        for at, object_id in enumerate(self.ids):
            held += (self.number(at, index) for index in _held(domain.object(object_id), self.files[at]))
        return pack(held, self.chunks)


def pack(numbers: Iterable[int], count: int) -> bytes:
    """A bitmap of `count` bits, the first chunk in the lowest bit of the first byte."""
    bits = bytearray(-(-count // 8))
    for number in numbers:
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def unpack(bitmap: bytes, count: int) -> list[int]:
    """The chunks below `count` whose bits are set."""
    return [n for n in range(min(count, 8 * len(bitmap))) if bitmap[n >> 3] >> (n & 7) & 1]


def _held(folder: ObjectFolder, file: ManifestFile) -> Iterable[int]:
    if folder.complete:
        return range(len(file.grid))
    try:
        with ChunkMap.open(folder.map, writable=False) as chunk_map:
            if not chunk_map.current or chunk_map.count != len(file.grid):
                return ()
            return [index for index, state in enumerate(chunk_map.states()) if state != ABSENT]
    except (FileNotFoundError, StoreError):
        # Nothing was begun, or a power loss has torn it: nothing of it is there to give.
        return ()
