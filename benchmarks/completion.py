"""The tensor-completion curve: how much of what has arrived is in whole tensors."""

from __future__ import annotations

import bisect
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.errors import HeadraceError
from headrace.cache.grid import Grid
from headrace.cache.safetensors import PREFIX, parse_header
from headrace.cache.store import Store

WINDOW = 0.05
FROM, FACTOR = 0.25, 0.8
_INTERVAL = 0.01


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (fraction of the bytes that arrived, fraction that is in complete tensors), in time order.

    Tensors larger than the window (5 % of the model) are not counted, in neither of the two.
    """

    points: tuple[tuple[float, float], ...]

    def worst(self) -> float:
        """The least complete/arrived of the points with f >= 0.25; 1 without any."""
        return min((whole / f for f, whole in self.points if f >= FROM), default=1.0)

    def at(self, f: float) -> float | None:
        """What was complete when f had arrived (the first point from there on)."""
        index = bisect.bisect_left([p[0] for p in self.points], f)
        return self.points[index][1] if index < len(self.points) else None

    def __str__(self) -> str:
        steps = [(f / 10, self.at(f / 10)) for f in range(1, 11)]
        row = "  ".join(f"{f:.1f}: {whole:.2f}" for f, whole in steps if whole is not None)
        met = "met" if self.worst() >= FACTOR else "NOT MET"
        return (
            f"    arrived: in complete tensors   {row}\n"
            f"    at least {self.worst():.2f} f for f >= {FROM} ({len(self.points)} samples; claim {FACTOR} f): {met}"
        )


@dataclass(frozen=True, slots=True)
class _File:
    """The tensors of one file, as chunk ranges [first, last) and sizes."""

    tensors: tuple[tuple[int, int, int], ...]


def watch(root: Path, model: Path, process: subprocess.Popen[Any]) -> Curve:
    """Sample the chunk maps of the store at `root` until it is full, or the process has ended."""
    points: list[tuple[float, float]] = []
    while process.poll() is None:
        opened = _open(root)
        if opened is not None:
            break
        time.sleep(_INTERVAL)
    else:
        return Curve(())
    maps, files, total = _describe(opened, model)
    try:
        while True:
            arrived = sum(_arrived(m, f) for m, f in zip(maps, files, strict=True))
            whole = sum(_whole(m, f) for m, f in zip(maps, files, strict=True))
            if not points or arrived / total > points[-1][0]:
                points.append((arrived / total, whole / total))
            if arrived >= total or process.poll() is not None:
                return Curve(tuple(points))
            time.sleep(_INTERVAL)
    finally:
        for chunk_map in maps:
            chunk_map.close()


def _open(root: Path) -> list[tuple[str, Grid, ChunkMap]] | None:
    """Path, grid and map of every object of the one snapshot, once all are there."""
    found: list[tuple[str, Grid, ChunkMap]] = []
    try:
        with Store.open(root, writable=False) as store:
            domain = next(store.domains())
            content = next(domain.snapshots()).manifest()
            for file in content.files:
                folder = domain.object(content.object_id(domain.name, file))
                found.append((file.path, file.grid, ChunkMap.open(folder.map, writable=False)))
    except (HeadraceError, StopIteration, FileNotFoundError):
        for _, _, chunk_map in found:
            chunk_map.close()
        return None
    return found


def _describe(
    opened: list[tuple[str, Grid, ChunkMap]], model: Path
) -> tuple[list[ChunkMap], list[_File], int]:
    window = WINDOW * sum(grid.size for _, grid, _ in opened)
    maps, files, total = [], [], 0
    for path, grid, chunk_map in opened:
        tensors = []
        for start, stop in _spans(model / path) if path.endswith(".safetensors") else ():
            if stop - start <= window:
                tensors.append((*grid.covering(start, stop), stop - start))
                total += stop - start
        maps.append(chunk_map)
        files.append(_File(tuple(tensors)))
    return maps, files, total


def _spans(path: Path) -> Iterable[tuple[int, int]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        header = parse_header(file.read(length), path.stat().st_size, str(path))
    return [(header.data_start + t.start, header.data_start + t.stop) for t in header.tensors.values()]


def _arrived(chunk_map: ChunkMap, file: _File) -> float:
    """Bytes of counted tensors that are there: of each the share of its chunks."""
    states = chunk_map.states()
    return sum(
        size * (1 - states[first:last].count(ABSENT) / (last - first)) for first, last, size in file.tensors
    )


def _whole(chunk_map: ChunkMap, file: _File) -> int:
    states = chunk_map.states()
    return sum(size for first, last, size in file.tensors if ABSENT not in states[first:last])
