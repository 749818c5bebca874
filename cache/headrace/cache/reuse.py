"""Bytes that are already on this disk: by content key, by digest, or by comparison.

A found chunk is hashed again before it is used, so a lookup may be wrong without harm.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.digest import chunk_digest
from headrace.cache.errors import StoreError
from headrace.cache.manifest import ManifestFile
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter, learned_digests, read_exactly
from headrace.cache.store import Domain

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Location:
    """Where on this disk a chunk's bytes lie."""

    folder: ObjectFolder
    start: int
    stop: int


class LocalChunks:
    """The chunks of a domain by digest: how a new revision moves only what changed."""

    def __init__(self, domain: Domain, algorithm: str, without: Container[str] = ()) -> None:
        """Look through the domain's objects, except those `without` (ids)."""
        self._algorithm = algorithm
        self._found: dict[tuple[int, bytes], Location] = {}
        for folder in domain.objects():
            if folder.id in without:
                continue
            try:
                self._add(folder)
            except (StoreError, OSError):
                # A damaged or just evicted object is no source; `verify` is who reports it.
                continue

    def _add(self, folder: ObjectFolder) -> None:
        spec = folder.spec()
        if spec.algorithm != self._algorithm:
            return
        states = None
        if not folder.complete:
            with ChunkMap.open(folder.map, writable=False) as chunk_map:
                if not chunk_map.current:
                    return
                states = chunk_map.states()
        for index, digest in enumerate(learned_digests(folder, len(spec.grid))):
            if digest is not None and (states is None or states[index] != ABSENT):
                start, stop = spec.grid.span(index, index + 1)
                self._found.setdefault((stop - start, digest), Location(folder, start, stop))

    def find(self, length: int, digest: bytes) -> Location | None:
        return self._found.get((length, digest))

    def read(self, location: Location) -> bytes | None:
        """The bytes, or None if they are gone; not yet verified."""
        for path in (location.folder.data, location.folder.partial):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                return read_exactly(fd, location.start, location.stop)
            finally:
                os.close(fd)
        return None


def adopt_twin(
    domain: Domain, file: ManifestFile, writer: ObjectWriter, go_on: Callable[[], None] = lambda: None
) -> bool:
    """Link a new object to one with the same content, if there is one; True when it is complete now.

    Every byte is hashed against what the publisher says before the link is made.

    Args:
        go_on: called between blocks; what it raises ends the work.
    """
    if file.size == 0 or (file.chunks is None and file.digest is None):
        return False
    for folder in domain.objects():
        if folder.id == writer.spec.id or not folder.complete:
            continue
        try:
            if folder.data.stat().st_size != file.size or not _may_be_twin(
                folder.spec(), folder, file, writer.spec
            ):
                continue
            digests = _matching_digests(folder.data, file, writer.spec, go_on)
        except (StoreError, OSError):
            continue
        if digests is None:
            continue
        for index, digest in enumerate(digests):
            writer.learned.put(index, digest)
        if writer.adopt(folder.data):
            return True
    return False


def _may_be_twin(theirs: ObjectSpec, folder: ObjectFolder, file: ManifestFile, ours: ObjectSpec) -> bool:
    """Whether hashing another object of the same size is worth it."""
    if theirs.key == ours.key:
        return True
    if file.chunks is None:
        return False
    if theirs.grid == ours.grid and theirs.algorithm == ours.algorithm:
        known = learned_digests(folder, len(theirs.grid))
        return all(a is None or a.hex() == b for a, b in zip(known, file.chunks, strict=True))
    # Another grid: the first chunk of ours decides.
    start, stop = ours.grid.span(0, 1)
    return _digest_of(folder.data, start, stop, ours.algorithm) == file.chunks[0]


def _matching_digests(
    data: Path, file: ManifestFile, spec: ObjectSpec, go_on: Callable[[], None]
) -> list[bytes] | None:
    """The chunk digests of a local file, if it is what the publisher says."""
    whole = hashlib.sha256() if file.chunks is None else None
    digests = []
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in range(len(spec.grid)):
            go_on()
            part = read_exactly(fd, *spec.grid.span(index, index + 1))
            if part is None:
                return None
            digest = chunk_digest(spec.algorithm, part)
            if file.chunks is not None and digest.hex() != file.chunks[index]:
                return None
            if whole is not None:
                whole.update(part)
            digests.append(digest)
    finally:
        os.close(fd)
    if whole is not None and f"sha256:{whole.hexdigest()}" != file.digest:
        return None
    return digests


def _digest_of(path: Path, start: int, stop: int, algorithm: str) -> str | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        part = read_exactly(fd, start, stop)
    finally:
        os.close(fd)
    return None if part is None else chunk_digest(algorithm, part).hex()


def equal_object(
    domain: Domain, folder: ObjectFolder, spec: ObjectSpec, go_on: Callable[[], None] = lambda: None
) -> ObjectFolder | None:
    """Another complete object of the domain with the same bytes in another inode, compared byte by byte."""
    ours = learned_digests(folder, len(spec.grid))
    if spec.size == 0 or None in ours:
        return None
    for other in domain.objects():
        if other.id == folder.id or not other.complete:
            continue
        try:
            if other.data.stat().st_size != spec.size or os.path.samefile(other.data, folder.data):
                continue
            theirs = other.spec()
            if theirs.grid != spec.grid or theirs.algorithm != spec.algorithm:
                continue
            if _same_digests(ours, learned_digests(other, len(spec.grid))) and _same_bytes(
                folder.data, other.data, go_on
            ):
                return other
        except (StoreError, OSError):
            continue
    return None


def _same_digests(ours: Sequence[bytes | None], theirs: Sequence[bytes | None]) -> bool:
    return all(a == b for a, b in zip(ours, theirs, strict=True))


def _same_bytes(one: Path, other: Path, go_on: Callable[[], None]) -> bool:
    with open(one, "rb", buffering=0) as a, open(other, "rb", buffering=0) as b:
        while True:
            go_on()
            left, right = a.read(_BLOCK), b.read(_BLOCK)
            if left != right:
                return False
            if not left:
                return True
