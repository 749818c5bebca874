"""The chunk map: one byte per chunk, memory-mapped, beside every object.

File: a header page (`_HEADER`), then `count` state bytes, then `count` wanted bytes. Bytes are stored
whole, so that several processes mark different chunks without a lock. The file is allocated, not
sparse: a full disk must not become a SIGBUS.

Crash story: a mark is set only after the chunk's bytes and learned digest are in the page cache, so
after a killed process every mark is true. After a power loss the marks on disk may be newer than the
bytes: `WRITTEN` counts only while the header's boot id is this boot's; `DURABLE` is set only after
fdatasync and is believed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from headrace.cache.disk import allocate
from headrace.cache.errors import StoreError

ABSENT, WRITTEN, DURABLE = 0, 1, 2

_HEADER = struct.Struct("<8sIIQ36s36s")  # magic, version, -, count, boot written on, boot verified on
_MAGIC = b"HRCHUNKS"
_VERSION = 1
_PAGE = 4096
_BOOT = struct.Struct("36s")
_BOOT_AT = 24
_VERIFIED_AT = 60


def boot_id() -> str:
    """This boot's random id (36 characters)."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


class ChunkMap:
    """An open chunk map. Not closed while another thread uses it."""

    def __init__(self, fd: int, where: str, *, writable: bool) -> None:
        """Map an open descriptor, which the map then owns.

        Raises:
            StoreError: not a chunk map, or a truncated one.
        """
        self._fd = fd
        self._this_boot = boot_id().encode()
        size = os.fstat(fd).st_size
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        if size < _PAGE:
            raise StoreError(f"the chunk map {where!r} is truncated: run `headrace verify --repair`.")
        self._mm = mmap.mmap(fd, size, access=access)
        magic, version, _, self.count, _, _ = _HEADER.unpack_from(self._mm)
        if magic != _MAGIC or version != _VERSION or size < _PAGE + 2 * self.count:
            self._mm.close()
            raise StoreError(
                f"{where!r} is not a chunk map of version {_VERSION}: run `headrace verify --repair`."
            )

    @classmethod
    def create(cls, path: Path, count: int) -> None:
        """Write a map of `count` absent chunks; `sync` it before a mark is to outlast a power loss."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            pages = -(-(2 * count) // _PAGE)
            allocate(fd, _PAGE * (1 + pages))
            # Nothing is in it yet, so nothing that was not verified on this boot.
            boot = boot_id().encode()
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, 0, count, boot, boot), 0)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> ChunkMap:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            return cls(fd, str(path), writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def current(self) -> bool:
        """Whether `WRITTEN` marks are of this boot, and so to be believed."""
        return bool(_BOOT.unpack_from(self._mm, _BOOT_AT)[0] == self._this_boot)

    def set_current(self) -> None:
        _BOOT.pack_into(self._mm, _BOOT_AT, self._this_boot)

    @property
    def verified_this_boot(self) -> bool:
        """Whether the object was last verified against its digests on this boot."""
        return bool(_BOOT.unpack_from(self._mm, _VERIFIED_AT)[0] == self._this_boot)

    @property
    def verified_ever(self) -> bool:
        """Whether there is a boot on which everything in the object was verified, and nothing found wrong since."""
        return bool(_BOOT.unpack_from(self._mm, _VERIFIED_AT)[0].strip(b"\0"))

    def set_verified(self) -> None:
        _BOOT.pack_into(self._mm, _VERIFIED_AT, self._this_boot)

    def forget_verified(self) -> None:
        """Something in the object is wrong, or is believed without having been verified since it was written."""
        _BOOT.pack_into(self._mm, _VERIFIED_AT, b"")

    def states(self) -> bytes:
        """A copy of all states."""
        return self._mm[_PAGE : _PAGE + self.count]

    def state(self, index: int) -> int:
        return self._mm[_PAGE + index]

    def mark(self, index: int, state: int) -> None:
        self._mm[_PAGE + index] = state

    def ready(self, first: int, last: int) -> bool:
        """Whether every chunk of [first, last) may be read."""
        states = self._mm[_PAGE + first : _PAGE + last]
        if ABSENT in states:
            return False
        return WRITTEN not in states or self.current

    @property
    def full(self) -> bool:
        """Whether every chunk may be read."""
        return self.ready(0, self.count)

    def next_absent(self, start: int) -> int:
        """The first absent chunk at or after `start`, or -1."""
        found = self._mm.find(b"\0", _PAGE + start, _PAGE + self.count)
        return found - _PAGE if found >= 0 else -1

    def absent_run(self, start: int, limit: int) -> int:
        """The end of the run of absent chunks from `start` on, at most `limit`."""
        states = self._mm[_PAGE + start : _PAGE + min(limit, self.count)]
        return start + len(states) - len(states.lstrip(b"\0"))

    def want(self, first: int, last: int) -> None:
        """Ask stagers to take the chunks [first, last) before others."""
        base = _PAGE + self.count
        self._mm[base + first : base + last] = b"\1" * (last - first)

    def wanted(self) -> Iterator[int]:
        """Chunks that readers wait for and that are absent."""
        base = _PAGE + self.count
        found = self._mm.find(b"\1", base, base + self.count)
        while found >= 0:
            if self.state(found - base) == ABSENT:
                yield found - base
            else:
                self._mm[found] = 0
            found = self._mm.find(b"\1", found + 1, base + self.count)

    def promote(self, indexes: list[int]) -> None:
        """WRITTEN -> DURABLE for chunks that were synced."""
        for index in indexes:
            self.mark(index, DURABLE)

    def sync(self) -> None:
        """Make the marks themselves durable."""
        self._mm.flush()
        os.fsync(self._fd)

    def close(self) -> None:
        if not self._mm.closed:
            self._mm.close()
            os.close(self._fd)

    def __enter__(self) -> ChunkMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
