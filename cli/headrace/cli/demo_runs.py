"""The demo's runs: download and then load, against headrace cold, warm, and resumed after a kill."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from headrace.cache.errors import NotStaged
from headrace.cache.inventory import entry
from headrace.cache.progress import Progress
from headrace.cache.store import Store
from headrace.cli import demo_models
from headrace.cli.demo_server import BUCKET, Server
from headrace.cli.loading import load_model

KILL_AT = 0.5
"""Fraction of the bytes after which the staging process is killed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the demo's table.

    Attributes:
        seconds: until every tensor was in memory.
        origin: bytes read from the object store.
        compared: tensors that were equal to what safetensors reads.
        times: where the time went, in seconds; of several threads, summed.
        note: what else there is to say.
    """

    model: str
    kind: str
    seconds: float
    bytes: int
    origin: int
    compared: int
    times: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def plain(model: str, folder: Path, server: Server, into: Path) -> Run:
    """boto3's transfer manager to a folder, then `safetensors.torch.load_file`, every page touched."""
    into.mkdir()
    begun = time.perf_counter()
    with contextlib.closing(server.client()) as client:
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{model}/")["Contents"]
        for found in listed:
            target = into / found["Key"].removeprefix(f"{model}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, found["Key"], str(target))
    downloaded = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(into.glob("*.safetensors")):
        tensors |= load_file(path)
    _touch(tensors)
    ended = time.perf_counter()
    return Run(
        model,
        "download, then load",
        ended - begun,
        _size(tensors),
        sum(found["Size"] for found in listed),
        demo_models.compare(folder, tensors),
        {"download": downloaded - begun, "load": ended - downloaded},
    )


def cold(model: str, folder: Path, root: Path) -> Run:
    """Load a reference that nothing is staged of: tensors fill while their bytes arrive."""
    return _run(model, "headrace, cold", folder, root)


def warm(model: str, folder: Path, root: Path) -> Run:
    """Load it again from the store; the origin is only asked whether it changed."""
    return _run(model, "headrace, warm", folder, root)


def resumed(model: str, folder: Path, root: Path) -> Run:
    """Kill a staging process midway with SIGKILL, then load."""
    command = [
        sys.executable,
        "-m",
        "headrace.cli.main",
        "stage",
        _uri(model),
        "--root",
        str(root),
        "--quiet",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and _present(root) < KILL_AT:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    kept = _present(root)
    how = f"killed (-9) with {kept:.0%} there" if kept < 1 else "it had finished before it was killed"
    return _run(model, "headrace, resumed", folder, root, how)


def _run(model: str, kind: str, folder: Path, root: Path, note: str = "") -> Run:
    progress = Progress()
    outcome = load_model(_uri(model), root=str(root), domain=None, progress=progress)
    touching = _touch(outcome.loaded.tensors)
    return Run(
        model,
        kind,
        outcome.stats.seconds + touching,
        outcome.stats.bytes,
        progress.fetched["origin"],
        demo_models.compare(folder, outcome.loaded.tensors),
        {span.name: span.seconds for span in outcome.stats.trace if span.seconds >= 0.005},
        note,
    )


def _touch(tensors: Mapping[str, torch.Tensor]) -> float:
    """Read a byte of every page, so that mapped tensors count as loaded only when they are; the seconds."""
    begun = time.perf_counter()
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()
    return time.perf_counter() - begun


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _uri(model: str) -> str:
    return f"s3://{BUCKET}/{model}"


def _present(root: Path) -> float:
    """The fraction of the one snapshot in a store that is there, 0.0 before it is made."""
    try:
        with Store.open(root, writable=False) as store:
            domain = store.domain()
            for snapshot in domain.snapshots():
                found = entry(domain, snapshot)
                return found.present / found.bytes
    except NotStaged:
        pass
    return 0.0
