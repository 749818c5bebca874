"""What must hold in a store after a crash, and in how far it had come."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from support.models import assert_marks_are_true, visible
from support.served import Request

from headrace.cache.chunkmap import ChunkMap
from headrace.cache.errors import StoreError
from headrace.cache.store import Store

Spans = dict[str, list[tuple[int, int]]]
"""Byte ranges by file."""


def many_small_files(model: Mapping[str, bytes], count: int) -> dict[str, bytes]:
    """The model with small files beside it, so that completing and linking take their share of the time."""
    small = {f"extra/part-{i:02d}.json": bytes([i]) * (100 + 37 * i) for i in range(count)}
    return {**model, **small}


def assert_nothing_wrong(root: Path, truth: Mapping[str, bytes], torn: Collection[str] = ()) -> int:
    """Every readable chunk is right and every snapshot shows all of its files or none; the chunks looked at.

    Args:
        torn: ids of objects that cannot be opened, as a power loss may leave them.
    """
    if not (root / "format").exists():
        assert not list(root.glob("domains/*/*/*"))
        return 0
    for path, data in visible(root).items():
        assert data == truth[path], f"{path} is wrong"
    with Store.open(root, writable=False) as store:
        for domain in store.domains():
            for snapshot in domain.snapshots():
                if snapshot.complete:
                    shown = {
                        str(p.relative_to(snapshot.files)) for p in snapshot.files.rglob("*") if p.is_file()
                    }
                    assert shown == set(snapshot.manifest().by_path)
    return assert_marks_are_true(root, truth, torn)


def marked(root: Path) -> Spans:
    """The byte ranges that may be read, by file."""
    found: Spans = {}
    if not (root / "format").exists():
        return found
    with Store.open(root, writable=False) as store:
        for domain in store.domains():
            for snapshot in domain.snapshots():
                content = snapshot.manifest()
                for file in content.files:
                    folder = domain.object(content.object_id(domain.name, file))
                    if not folder.path.exists():
                        continue
                    with ChunkMap.open(folder.map, writable=False) as chunk_map:
                        ready = [folder.complete or chunk_map.ready(i, i + 1) for i in range(len(file.grid))]
                    found[file.path] = [
                        file.grid.span(i, i + 1) for i, is_ready in enumerate(ready) if is_ready
                    ]
    return found


def size_of(spans: Spans) -> int:
    return sum(stop - start for of_file in spans.values() for start, stop in of_file)


def sent(requests: Iterable[Request], files: Iterable[str], prefix: str = "model/") -> Spans:
    """The byte ranges of `files` that were served."""
    found: Spans = {path: [] for path in files}
    for request in requests:
        path = request.path.removeprefix(prefix)
        if request.method == "GET" and request.status in (200, 206) and path in found:
            found[path].append((request.start, request.stop))
    return found


def overlaps(one: Spans, other: Spans) -> list[tuple[str, int, int]]:
    """Where both have bytes."""
    return [
        (path, max(a, c), min(b, d))
        for path, spans in one.items()
        for a, b in spans
        for c, d in other.get(path, ())
        if max(a, c) < min(b, d)
    ]


def phase(root: Path, count: int) -> str:
    """How far staging a snapshot of `count` different files had come."""
    if not (root / "format").exists():
        return "making the store"
    snapshots = list(root.glob("domains/*/snapshots/*"))
    if not snapshots:
        return "resolving"
    if any((s / "files").exists() for s in snapshots):
        return "linked"
    folders = list(root.glob("domains/*/objects/*"))
    if len(folders) < count:
        return "opening objects"
    complete = sum((f / "data").exists() for f in folders)
    if complete == count:
        return "linking"
    maps = [f / "map" for f in folders if not (f / "data").exists()]
    if all(_full(m) for m in maps):
        return "completing"
    return "filling and completing" if complete else "filling"


def _full(path: Path) -> bool:
    try:
        with ChunkMap.open(path, writable=False) as chunk_map:
            return chunk_map.full
    except StoreError:
        # Torn by a power loss: nothing of it was synced.
        return False


def leftovers(root: Path) -> Sequence[str]:
    """What a killed process may leave and the next one must take away."""
    found = [*root.glob("tmp/*"), *root.glob("trash/*"), *root.rglob(".tmp-*")]
    found += [p for p in root.glob("domains/*/objects/*/partial") if (p.parent / "data").exists()]
    return [str(path.relative_to(root)) for path in found]


def wait_until_marked(root: Path, size: int, timeout: float = 20.0) -> None:
    """Return when at least `size` bytes may be read."""
    deadline = time.monotonic() + timeout
    while size_of(marked(root)) < size:
        assert time.monotonic() < deadline, f"fewer than {size} bytes arrived in {timeout} s"
        time.sleep(0.005)
