"""Writes safetensors files byte by byte, also such as no library would write."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from headrace.cache.safetensors import DTYPE_BITS


class Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def entry(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> Entry:
    """A tensor of random bytes (for BOOL of zeros and ones, as torch needs)."""
    count = 1
    for size in shape:
        count *= size
    data = random.Random(f"{name}{seed}").randbytes(count * DTYPE_BITS[dtype] // 8)
    if dtype == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return Entry(name, dtype, shape, data)


def header_of(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> dict[str, object]:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for one in entries:
        end = position + len(one.data)
        header[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [position, end]}
        position = end
    return header


def file_bytes(
    entries: Iterable[Entry], metadata: Mapping[str, str] | None = None, *, align: int = 8, shift: int = 0
) -> bytes:
    """A whole file. The data start at a multiple of `align`, plus `shift` bytes."""
    entries = list(entries)
    head = json.dumps(header_of(entries, metadata), separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % align + shift)
    return raw_file(head, b"".join(one.data for one in entries))


def raw_file(head: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def write_sharded(folder: Path, shards: Mapping[str, list[Entry]], index: str | None = None) -> None:
    """Shards by file name, and an index unless None."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name, entries in shards.items():
        (folder / name).write_bytes(file_bytes(entries))
        weight_map.update({one.name: name for one in entries})
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
