"""What tests of a cluster stand on: a network, an origin, and a small model published there."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support import namespaces, nginx, redis_server, revisions
from support.cluster import MEMORY, Cluster
from support.namespaces import Network, Rate
from support.origin import Origin

from headrace.cache.manifest import PUBLISHED_NAME, parse
from headrace.cache.policy.limits import Limits
from headrace.cache.publish import publish

CHUNK = 256 << 10
LINK = Rate(up=200, down=200)
"""Mbit/s of a node: the model takes a second and a half."""
QUICK = {"tracker": {"lease": 3.0}, "peers": {"heartbeat": 1.0}}
"""A death is noticed within three seconds."""
CLAIMS = Limits().claims * CHUNK
"""Bytes that one node may be reading from the origin when it dies, or when the tracker is lost."""

Make = Callable[..., Cluster]
"""Makes a cluster of so many nodes, to begin with."""


@dataclass(frozen=True)
class Bed:
    """
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

    @contextmanager
    def cluster(self, nodes: int = 4, **how: Any) -> Iterator[Cluster]:
        """A cluster of so many nodes to begin with; afterwards its processes are gone and links are as before."""
        # Sockets have short paths only.
        with (
            tempfile.TemporaryDirectory(prefix="headrace-", dir=MEMORY) as folder,
            Cluster(self.network, self.origin, Path(folder), rate=LINK, settings=QUICK, **how) as cluster,
        ):
            self.origin.reads()
            try:
                yield cluster.start(nodes)
            finally:
                self.network.heal()


def missing() -> str | None:
    """Why there can be no bed here; None if there can."""
    if reason := namespaces.missing():
        return reason
    for name, binary in (("nginx", nginx.BINARY), ("redis-server", redis_server.BINARY), ("weed", _weed())):
        if binary is None:
            return f"needs the program {name}"
    return None


def _weed() -> str | None:
    return shutil.which(Path(sys.executable).with_name("weed"))


@contextmanager
def bed() -> Iterator[Bed]:
    """Set one up, and tear it down."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-", dir=MEMORY)))
        network = stack.enter_context(Network())
        origin = stack.enter_context(Origin(network.add("origin", Rate(400, 400)), folder / "origin"))
        model = folder / "model"
        base = revisions.transformer(hidden=448, inner=2432, vocab=4096, layers=4)
        replace(base, shards=3).write(model)
        published = publish(model, str(model), chunk=CHUNK)
        content = parse((model / PUBLISHED_NAME).read_bytes(), PUBLISHED_NAME)
        chunks = sum(len(file.grid) for file in content.files)
        yield Bed(network, origin, model, origin.put(model, "model"), published.bytes, chunks)
