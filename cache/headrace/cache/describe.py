"""A local file as an entry of a manifest: its grid, and all its digests in one pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from headrace.cache.digest import XXH3, hasher
from headrace.cache.errors import IntegrityError
from headrace.cache.grid import DEFAULT_CHUNK, Grid, by_tensors, fixed
from headrace.cache.manifest import ManifestFile
from headrace.cache.safetensors import read_header

# Small enough to stay in a core's cache between the two digests.
_BLOCK = 1 << 20


def describe(
    fd: int,
    path: str,
    *,
    where: str,
    chunk: int = DEFAULT_CHUNK,
    algorithm: str = XXH3,
    check: Callable[[], None] = lambda: None,
) -> ManifestFile:
    """Read an open file once, and return its entry with sha256 and chunk digests.

    Args:
        fd: open for reading; its position is neither used nor moved.
        path: the entry's path; a name that ends in ".safetensors" has to be such a file.
        where: what the file is called in messages.
        chunk: the largest chunk, in bytes.
        check: called between blocks; what it raises ends the reading.

    Raises:
        CheckpointError: called safetensors, and is not.
        IntegrityError: the file became shorter while it was read.
        OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    grid = grid_of(fd, path, size, where=where, chunk=chunk)
    whole = hashlib.sha256()
    chunks = []
    buffer = memoryview(bytearray(min(_BLOCK, max(1, size))))
    for start, length in zip(grid.offsets, grid.lengths, strict=False):
        state, position, end = hasher(algorithm), start, start + length
        while position < end:
            check()
            block = buffer[: min(_BLOCK, end - position)]
            block = block[: os.preadv(fd, [block], position)]
            if not block:
                raise IntegrityError(f"{where} became shorter while it was read: repeat it when it is whole.")
            whole.update(block)
            state.update(block)
            position += len(block)
        chunks.append(state.digest().hex())
    return ManifestFile(path, size, grid, f"sha256:{whole.hexdigest()}", tuple(chunks))


def grid_of(fd: int, path: str, size: int, *, where: str, chunk: int = DEFAULT_CHUNK) -> Grid:
    """The grid of an open file: by its tensors where it is safetensors. Raises as `describe`."""
    if not path.endswith(".safetensors"):
        return fixed(size, chunk)
    header = read_header(fd, where)
    spans = ((header.data_start + t.start, header.data_start + t.stop) for t in header.tensors.values())
    return by_tensors(size, header.data_start, spans, chunk)
