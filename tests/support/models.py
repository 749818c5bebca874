"""Small models as bytes by path, their published manifests, and staging them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.safetensors_files import entry, file_bytes

from headrace.cache.chunkmap import ChunkMap
from headrace.cache.digest import XXH3, chunk_digest
from headrace.cache.grid import Grid, by_tensors, fixed
from headrace.cache.manifest import PUBLISHED_NAME, Manifest, ManifestFile
from headrace.cache.object import ObjectFolder, learned_digests, read_exactly
from headrace.cache.origins.options import OriginOptions
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.safetensors import PREFIX, parse_header
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StageReport, StagingJob, run
from headrace.cache.store import Store

CHUNK = 64 * 1024
# A request that meets a timeout is made again, and its bytes are sent twice: on a machine that stands still
# for a moment, too. So where requests and bytes are counted, nothing but a fault may end a request.
PATIENT = OriginOptions(
    connect_timeout=60,
    first_byte_timeout=60,
    stall_timeout=60,
    attempts=4,
    backoff_base=0.005,
    backoff_max=0.02,
)
IMPATIENT = replace(PATIENT, connect_timeout=2, first_byte_timeout=1, stall_timeout=1)
"""For servers that stall."""


def small_model(seed: int = 0, *, tensors: int = 12, rows: int = 160) -> dict[str, bytes]:
    """Two shards of F32 tensors (some smaller, some larger than a chunk) and a configuration."""
    files: dict[str, bytes] = {"config.json": b'{"model_type": "test"}'}
    for shard in (1, 2):
        entries = [
            entry(f"layers.{shard}.{i}.weight", "F32", (rows if i % 3 else 4, 256), seed)
            for i in range(tensors)
        ]
        files[f"model-{shard:05d}-of-00002.safetensors"] = file_bytes(entries)
    return files


def grid_of(path: str, data: bytes, chunk: int = CHUNK) -> Grid:
    if not path.endswith(".safetensors"):
        return fixed(len(data), chunk)
    length = int.from_bytes(data[:PREFIX], "little")
    header = parse_header(data[PREFIX : PREFIX + length], len(data), path)
    spans = ((header.data_start + t.start, header.data_start + t.stop) for t in header.tensors.values())
    return by_tensors(len(data), header.data_start, spans, chunk)


def manifest_of(files: Mapping[str, bytes], *, chunk: int = CHUNK, algorithm: str = XXH3) -> Manifest:
    """What a publisher would write for these files."""
    entries = []
    for path, data in sorted(files.items()):
        grid = grid_of(path, data, chunk)
        spans = [grid.span(i, i + 1) for i in range(len(grid))]
        chunks = tuple(chunk_digest(algorithm, data[a:b]).hex() for a, b in spans)
        entries.append(
            ManifestFile(path, len(data), grid, f"sha256:{hashlib.sha256(data).hexdigest()}", chunks)
        )
    return Manifest(tuple(entries), algorithm, published=True)


def published(files: Mapping[str, bytes], **how: Any) -> dict[str, bytes]:
    """The files with their published manifest beside them."""
    return {**files, PUBLISHED_NAME: manifest_of(files, **how).to_published()}


def below(prefix: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix}/{path}": data for path, data in files.items()}


def stage_small(reference: str, root: Path, progress: Progress | None = None, **request: Any) -> StageReport:
    """Stage with 64 KiB chunks, one chunk a request, and patience (see `PATIENT`)."""
    values: dict[str, Any] = {
        "chunk": CHUNK,
        "options": PATIENT,
        "limits": StagerLimits(span=CHUNK, connections=8, reserve=0),
        "workers": 1,
        "domain": "default",
        **request,
    }
    return run(StagingJob(StageRequest(reference, str(root), **values), progress))


def visible(root: Path) -> dict[str, bytes]:
    """Every file that an ordinary program can open under any snapshot's `files`."""
    found = {}
    for files in root.glob("domains/*/snapshots/*/files"):
        for path in files.rglob("*"):
            if path.is_file():
                found[str(path.relative_to(files))] = path.read_bytes()
    return found


def assert_marks_are_true(root: Path, truth: Mapping[str, bytes], torn: Collection[str] = ()) -> int:
    """Every chunk that some map calls readable has the bytes of one of the true files; how many there are.

    Args:
        torn: ids of objects that cannot be opened, as a power loss may leave them.
    """
    with Store.open(root, writable=False) as store:
        folders = [f for domain in store.domains() for f in domain.objects() if f.id not in torn]
        return sum(_check_object(folder, truth) for folder in folders)


def _check_object(folder: ObjectFolder, truth: Mapping[str, bytes]) -> int:
    spec = folder.spec()
    candidates = [data for data in truth.values() if len(data) == spec.size]
    assert candidates, f"no file has the size {spec.size}"
    with ChunkMap.open(folder.map, writable=False) as chunk_map:
        ready = [folder.complete or chunk_map.ready(i, i + 1) for i in range(len(spec.grid))]
    fd = os.open(folder.data if folder.complete else folder.partial, os.O_RDONLY)
    try:
        digests = learned_digests(folder, len(spec.grid))
        for index, is_ready in enumerate(ready):
            if is_ready:
                start, stop = spec.grid.span(index, index + 1)
                data = read_exactly(fd, start, stop)
                assert any(data == c[start:stop] for c in candidates), (
                    f"chunk {index} of {folder.id} is wrong"
                )
                digest = digests[index]
                assert digest is None or (data is not None and chunk_digest(spec.algorithm, data) == digest)
    finally:
        os.close(fd)
    return sum(ready)
