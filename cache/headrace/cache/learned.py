"""Learned digests: what this store computed for each chunk, apart from what a publisher says.

File `digests`: a 64-byte header, then one 48-byte slot per chunk: the digest (up to 32 bytes), a check
over digest and index (8 bytes), 8 spare. A slot torn by a power loss fails its check and counts as
unknown. Learned digests protect against corruption, not against a malicious node.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import xxhash

from headrace.cache.digest import digest_size
from headrace.cache.disk import allocate
from headrace.cache.errors import StoreError

_MAGIC = b"HRDIGEST"
_HEADER = struct.Struct("<8sI16s36x")
_SLOT = struct.Struct("<32sQ8x")


class LearnedDigests:
    """An open `digests` file; slots are written whole with pwrite."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Raises StoreError when it is not a digests file."""
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        head = os.pread(self._fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or head[:8] != _MAGIC:
            os.close(self._fd)
            raise StoreError(f"{str(path)!r} is not a digests file: run `headrace verify --repair`.")
        self.algorithm = _HEADER.unpack(head)[2].rstrip(b"\0").decode()
        self._width = digest_size(self.algorithm)

    @staticmethod
    def create(path: Path, count: int, algorithm: str) -> None:
        """Write empty slots."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            allocate(fd, _HEADER.size + count * _SLOT.size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, 1, algorithm.encode()), 0)
        finally:
            os.close(fd)

    def put(self, index: int, digest: bytes) -> None:
        slot = _SLOT.pack(digest, _check(index, digest))
        os.pwrite(self._fd, slot, _HEADER.size + index * _SLOT.size)

    def get(self, index: int) -> bytes | None:
        """One chunk's digest; None where unknown."""
        slot = os.pread(self._fd, _SLOT.size, _HEADER.size + index * _SLOT.size)
        return self._read(slot, 0, index) if len(slot) == _SLOT.size else None

    def all(self, count: int) -> list[bytes | None]:
        """Every chunk's digest; None where unknown."""
        data = os.pread(self._fd, count * _SLOT.size, _HEADER.size)
        found: list[bytes | None] = []
        for index in range(count):
            if (index + 1) * _SLOT.size > len(data):
                found.append(None)
                continue
            found.append(self._read(data, index * _SLOT.size, index))
        return found

    def _read(self, data: bytes, at: int, index: int) -> bytes | None:
        raw, check = _SLOT.unpack_from(data, at)
        digest: bytes = raw[: self._width]
        return digest if check == _check(index, digest) else None

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check(index: int, digest: bytes) -> int:
    # Never 0 for an empty slot: the seed keeps zeros from checking out.
    value: int = xxhash.xxh64_intdigest(digest, seed=index + 1)
    return value
