"""Everything here runs in network namespaces of its own, or says why it cannot."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import revisions
from support.cluster import Cluster
from support.namespaces import Network, Rate, missing
from support.nginx import BINARY as NGINX
from support.origin import Origin

from headrace.cache.manifest import PUBLISHED_NAME, parse
from headrace.cache.publish import publish

CHUNK = 256 << 10
LINK = Rate(up=200, down=200)
"""Mbit/s of a node. The model takes a second and a half."""


def _needed() -> None:
    reason = missing()
    if reason is None and NGINX is None:
        reason = "needs nginx"
    if reason is None and shutil.which("redis-server") is None:
        reason = "needs redis-server"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def network() -> Iterator[Network]:
    _needed()
    with Network() as made:
        yield made


@pytest.fixture
def origin(network: Network, tmp_path: Path) -> Iterator[Origin]:
    with Origin(network.add("origin", Rate(800, 800)), tmp_path / "origin") as started:
        yield started


@dataclass(frozen=True)
class Bed:
    """What the tests of this folder share: a network, an origin, and a model published there.

    Attributes:
        model: its folder.
        reference: the same at the origin.
        size: bytes of its files.
        chunks: how many.
    """

    network: Network
    origin: Origin
    model: Path
    reference: str
    size: int
    chunks: int


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    _needed()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-")))
        network = stack.enter_context(Network())
        origin = stack.enter_context(Origin(network.add("origin", Rate(400, 400)), folder / "origin"))
        model = folder / "model"
        base = revisions.transformer(hidden=448, inner=2432, vocab=4096, layers=4)
        replace(base, shards=3).write(model)
        published = publish(model, str(model), chunk=CHUNK)
        content = parse((model / PUBLISHED_NAME).read_bytes(), PUBLISHED_NAME)
        chunks = sum(len(file.grid) for file in content.files)
        yield Bed(network, origin, model, origin.put(model, "model"), published.bytes, chunks)


Make = Callable[..., Cluster]


@pytest.fixture
def make(bed: Bed) -> Iterator[Make]:
    """Makes a cluster on the bed; at the end its processes are killed and its links are as before."""
    with ExitStack() as stack:

        def made(nodes: int = 4, **how: Any) -> Cluster:
            # Sockets have short paths only.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-")))
            cluster = stack.enter_context(Cluster(bed.network, bed.origin, folder, rate=LINK, **how))
            bed.origin.reads()
            return cluster.start(nodes)

        yield made
        bed.network.heal()
