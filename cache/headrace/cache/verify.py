"""Verify: read every byte of a snapshot again and name what is not what it has to be.

Bytes are read around the page cache where the file system allows (O_DIRECT), so that it is the disk
that is checked and running models keep their cached pages. A chunk is compared with the manifest's
published digest, else with the digest learned when it was fetched; a file with neither, with its
whole sha256. Nothing is changed but the note of when an object was last verified.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cache import disk
from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.digest import Hasher, hasher
from headrace.cache.errors import NotStaged, StoreError
from headrace.cache.grid import Grid
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder, learned_digests
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain, Store

_BLOCK = 4 << 20
_PART = 64 << 20
_ALIGN = 4096
_THREADS = 8


@dataclass(frozen=True, slots=True)
class BadChunk:
    """Chunk `index` of the file `path`, the bytes [start, stop), and what is wrong with it."""

    path: str
    index: int
    start: int
    stop: int
    why: str


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file whose object or link is wrong as a whole.

    Attributes:
        kind: "object" (missing or damaged), "size" (bytes too many), "digest" (the whole file's), "link".
    """

    path: str
    kind: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found.

    Attributes:
        files: of the snapshot.
        bytes: read and compared.
        complete: whether the snapshot is staged; if not, only what is there was read.
        bad: chunks with wrong bytes.
        damaged: files whose object or link is wrong as a whole.
        unknown: paths with bytes that no digest is known for.
    """

    snapshot: str
    files: int
    bytes: int
    complete: bool
    bad: tuple[BadChunk, ...]
    damaged: tuple[BadFile, ...]
    unknown: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.bad and not self.damaged


@dataclass(frozen=True, slots=True)
class _Checked:
    """One object's result."""

    bytes: int = 0
    bad: tuple[BadChunk, ...] = ()
    damaged: tuple[BadFile, ...] = ()
    unknown: bool = False


def verify(
    store: Store,
    domain: Domain,
    snapshot: Snapshot,
    *,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> VerifyReport:
    """Read the whole snapshot again, in threads.

    Args:
        progress: called with the bytes just read, from any thread.

    Raises:
        NotStaged: there is no such snapshot, or it is being evicted.
        ManifestError: its manifest is damaged.
    """
    hold = snapshot.hold()
    if hold is None:
        raise NotStaged(f"the snapshot {snapshot.id[:12]} is not in this store: stage it.")
    count = threads or min(_THREADS, max(2, len(os.sched_getaffinity(0))))
    pool = ThreadPoolExecutor(count, "headrace-verify")
    try:
        with disk.translate(snapshot.path, "verifying"):
            return _verify(store, domain, snapshot, pool, progress or (lambda _: None))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(hold)


def _verify(
    store: Store,
    domain: Domain,
    snapshot: Snapshot,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> VerifyReport:
    content = snapshot.manifest()
    complete = snapshot.complete
    checked: dict[str, _Checked] = {}
    size = 0
    bad: list[BadChunk] = []
    damaged: list[BadFile] = []
    unknown: list[str] = []
    for file in content.files:
        object_id = content.object_id(domain.name, file)
        folder = domain.object(object_id)
        if object_id not in checked:
            checked[object_id] = _check_object(store, folder, file, content, complete, pool, progress)
            size += checked[object_id].bytes
        found = checked[object_id]
        # Two paths may share one object: what is wrong with it is wrong with both.
        bad += [BadChunk(file.path, b.index, b.start, b.stop, b.why) for b in found.bad]
        damaged += [BadFile(file.path, d.kind, d.why) for d in found.damaged]
        if found.unknown:
            unknown.append(file.path)
        if complete and (link := _check_link(snapshot.files / file.path, file, folder, content, pool)):
            damaged.append(link)
    return VerifyReport(
        snapshot.id, len(content.files), size, complete, tuple(bad), tuple(damaged), tuple(unknown)
    )


def _check_object(
    store: Store,
    folder: ObjectFolder,
    file: ManifestFile,
    content: Manifest,
    complete: bool,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> _Checked:
    def whole(kind: str, why: str) -> _Checked:
        return _Checked(damaged=(BadFile(file.path, kind, why),))

    if not folder.path.exists() or (complete and not folder.complete):
        return whole("object", "its object is missing") if complete else _Checked()
    if (why := damage(folder, file, content)) is not None:
        return whole("object", why)
    present = present_chunks(folder, len(file.grid))
    path = folder.data if folder.complete else folder.partial
    damaged: tuple[BadFile, ...] = ()
    if (size := path.stat().st_size) > file.size:
        damaged = (BadFile(file.path, "size", f"its object has {size} bytes instead of {file.size}"),)
    expected = known_digests(folder, file)
    found = chunk_digests(path, file.grid, content.algorithm, present, pool, progress)
    bad: list[BadChunk] = []
    unknown = False
    for index in present:
        digest = found[index]
        if isinstance(digest, str):
            bad.append(_bad(file, index, digest))
        elif expected[index] is None:
            unknown = True
        elif digest != expected[index]:
            bad.append(_bad(file, index, "its bytes do not have their digest"))
    if unknown and not bad and len(present) == len(file.grid) and file.digest is not None:
        unknown = False
        if sha256_of(path) != file.digest:
            why = "the file does not have its sha256 digest"
            damaged = (*damaged, BadFile(file.path, "digest", why))
    result = _Checked(
        sum(file.grid.lengths[i] for i in present), tuple(bad), damaged, unknown and not damaged
    )
    if not unknown and folder.complete and _may_write(store, folder):
        with ChunkMap.open(folder.map, writable=True) as chunk_map:
            if bad or damaged:
                chunk_map.forget_verified()
            else:
                chunk_map.set_verified()
    return result


def _bad(file: ManifestFile, index: int, why: str) -> BadChunk:
    start, stop = file.grid.span(index, index + 1)
    return BadChunk(file.path, index, start, stop, why)


def _may_write(store: Store, folder: ObjectFolder) -> bool:
    return store.writable and os.access(folder.map, os.W_OK)


def _check_link(
    link: Path, file: ManifestFile, folder: ObjectFolder, content: Manifest, pool: ThreadPoolExecutor
) -> BadFile | None:
    try:
        status = os.stat(link, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return BadFile(file.path, "link", "the file is missing in its snapshot")
    if not folder.complete or os.path.samestat(status, folder.data.stat()):
        return None
    # Where the file system allows no more links, a copy is what belongs there.
    if status.st_size == file.size and _same_content(link, folder.data, file.grid, content.algorithm, pool):
        return None
    return BadFile(file.path, "link", "its snapshot shows other bytes than its object has")


def _same_content(one: Path, other: Path, grid: Grid, algorithm: str, pool: ThreadPoolExecutor) -> bool:
    everything = range(len(grid))
    left = chunk_digests(one, grid, algorithm, everything, pool)
    right = chunk_digests(other, grid, algorithm, everything, pool)
    return left == right and not any(isinstance(d, str) for d in left.values())


def damage(folder: ObjectFolder, file: ManifestFile, content: Manifest) -> str | None:
    """What is wrong with an object's own small files, or None. Files of others (0600) are let be."""
    try:
        spec = folder.spec()
        if spec.grid != file.grid or spec.algorithm != content.algorithm:
            return "its object was made with other chunks than its manifest says"
        if not os.access(folder.path, os.W_OK) and not os.access(folder.map, os.R_OK):
            return None
        with ChunkMap.open(folder.map, writable=False) as chunk_map:
            if chunk_map.count != len(file.grid):
                return f"its chunk map has {chunk_map.count} chunks instead of {len(file.grid)}"
        learned_digests(folder, len(file.grid))
        if not folder.complete and not folder.partial.exists():
            return "its object has no bytes"
        os.stat(folder.lock)
    except FileNotFoundError as error:
        return f"its object lacks the file {os.path.basename(error.filename)!r}"
    except StoreError:
        return "the chunk map, digests or description of its object is damaged"
    return None


def present_chunks(folder: ObjectFolder, count: int) -> Sequence[int]:
    """The chunks that the store says it has."""
    if folder.complete:
        return range(count)
    try:
        with ChunkMap.open(folder.map, writable=False) as chunk_map:
            if not chunk_map.current:
                # Marks of an earlier boot: the next stager hashes them again before it trusts them.
                return ()
            return [i for i, state in enumerate(chunk_map.states()) if state != ABSENT]
    except PermissionError:
        return ()


def known_digests(folder: ObjectFolder, file: ManifestFile) -> Sequence[bytes | None]:
    """Each chunk's digest: published, else learned, else None."""
    if file.chunks is not None:
        return [bytes.fromhex(c) for c in file.chunks]
    try:
        return learned_digests(folder, len(file.grid))
    except (PermissionError, FileNotFoundError):
        return [None] * len(file.grid)


# -- reading


def chunk_digests(
    path: Path,
    grid: Grid,
    algorithm: str,
    indexes: Sequence[int],
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[int, bytes | str]:
    """The digests of a file's chunks as they are on disk; a sentence for a chunk that cannot be read.

    Args:
        indexes: ascending.
        progress: called with the bytes just read, from any thread.
    """

    def part(batch: Sequence[int]) -> list[tuple[int, bytes | str]]:
        with _reading(path) as fd, mmap.mmap(-1, _BLOCK + _ALIGN) as buffer:
            return [(i, _digest(fd, buffer, *grid.span(i, i + 1), algorithm, progress)) for i in batch]

    return dict(pair for found in pool.map(part, _batches(grid, indexes)) for pair in found)


def _batches(grid: Grid, indexes: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for index in indexes:
        batch.append(index)
        size += grid.lengths[index]
        if size >= _PART:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    """A descriptor that reads from the disk itself, where the file system can."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _digest(
    fd: int, buffer: mmap.mmap, start: int, stop: int, algorithm: str, progress: Callable[[int], None]
) -> bytes | str:
    state: Hasher = hasher(algorithm)
    try:
        with memoryview(buffer) as view:
            while start < stop:
                # O_DIRECT wants aligned offsets and lengths; what was read around the chunk is cut off.
                aligned = start - start % _ALIGN
                length = min(len(view), -(-(stop - aligned) // _ALIGN) * _ALIGN)
                with view[:length] as block:
                    got = os.preadv(fd, [block], aligned)
                end = min(aligned + got, stop)
                if end <= start:
                    return f"it ends at byte {start}"
                with view[start - aligned : end - aligned] as piece:
                    state.update(piece)
                progress(end - start)
                start = end
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EUCLEAN, errno.ENODATA):
            raise
        return f"it cannot be read ({os.strerror(error.errno)})"
    return state.digest()


def sha256_of(path: Path) -> str:
    """A whole file's digest, as manifests spell it."""
    state = hashlib.sha256()
    with _reading(path) as fd, mmap.mmap(-1, _BLOCK) as buffer, memoryview(buffer) as view:
        start = 0
        while got := os.preadv(fd, [view], start):
            with view[:got] as piece:
                state.update(piece)
            start += got
            if got % _ALIGN:
                break
    return f"sha256:{state.hexdigest()}"
