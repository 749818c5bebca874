"""Digest algorithms of chunks and files.

`xxh3-128` catches every accident and costs next to nothing; `blake3` is cryptographic, for signed
manifests and for nodes or tenants that do not trust each other.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import xxhash

from headrace.cache.errors import MissingDependency, UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

XXH3 = "xxh3-128"
BLAKE3 = "blake3"
ALGORITHMS = (XXH3, BLAKE3)


class Hasher(Protocol):
    """What hashlib, xxhash and blake3 objects have in common."""

    def update(self, data: Buffer, /) -> object: ...

    def digest(self) -> bytes: ...


def hasher(algorithm: str) -> Hasher:
    """A fresh hasher.

    Raises:
        UsageError: an unknown algorithm.
        MissingDependency: blake3 without its library.
    """
    if algorithm == XXH3:
        fast: Hasher = xxhash.xxh3_128()
        return fast
    if algorithm == BLAKE3:
        try:
            from blake3 import blake3
        except ImportError:
            raise MissingDependency("blake3 digests need `pip install 'headrace[cache]'`.") from None
        return blake3()
    if algorithm == "sha256":
        return hashlib.sha256()
    raise UsageError(f"{algorithm!r} is no digest algorithm: use {' or '.join(ALGORITHMS)}.")


def digest_size(algorithm: str) -> int:
    """Bytes of one digest."""
    return {XXH3: 16, BLAKE3: 32, "sha256": 32}[algorithm]


def chunk_digest(algorithm: str, data: Buffer) -> bytes:
    """The digest of one chunk's bytes."""
    state = hasher(algorithm)
    state.update(data)
    return state.digest()


def identity(*parts: str) -> str:
    """The sha256 (hex) over parts, each closed with a NUL: how ids are made."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode())
        state.update(b"\0")
    return state.hexdigest()
