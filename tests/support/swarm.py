"""Nodes of a cluster in one process: each with a store, a peer server and staging jobs of its own, on loopback."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.models import CHUNK, PATIENT, visible
from support.ports import free

from headrace.cache.cluster import Cluster, ClusterSettings
from headrace.cache.numbering import Numbering
from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.security import Security
from headrace.cache.peers.server import PeerServer
from headrace.cache.policy.limits import Limits
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StageReport, StagingJob
from headrace.cache.store import Store
from headrace.cache.tracker.memory import MemorySwarms, MemoryTracker
from headrace.cache.tracker.protocol import Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings

LIVES = 3600.0
TIMEOUTS = PeerTimeouts(connect=2.0, first_byte=2.0, stall=2.0)


class SharedSwarms(MemorySwarms):
    """`MemorySwarms` that nodes in several threads share: one call at a time."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._one_at_a_time = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._one_at_a_time:
                return found(*args, **kwargs)

        return locked


class Node:
    """One node. `start` and `stop` its peer server, or use it as a context manager."""

    def __init__(
        self,
        root: Path,
        shared: MemorySwarms | TrackerSettings | None,
        *,
        zone: str = "",
        limits: Limits | None = None,
        timeouts: PeerTimeouts = TIMEOUTS,
        grace: float = 3.0,
        tracker: Callable[[MemoryTracker], Any] = lambda tracker: tracker,
    ) -> None:
        """
        Args:
            shared: what the nodes have in common, in this process or in Redis; None: they only know each other.
            tracker: wraps the node's tracker, in this process.
        """
        self.root = root
        self.shared = shared
        self.others: tuple[Peer, ...] = ()
        self._store = Store.open(root)
        self._server = PeerServer(self._store, Security(), listen=("127.0.0.1", 0))
        self._limits = limits
        self._timeouts = timeouts
        self._zone = zone
        self._grace = grace
        self._wrap = tracker
        self.me = Peer("", "")

    def start(self) -> Node:
        self._server.start()
        self.known_as(self._server.address)
        return self

    @property
    def address(self) -> str:
        """Of the peer server itself."""
        return self._server.address

    def known_as(self, address: str) -> None:
        """Others reach this node under that address from now on."""
        if isinstance(self.shared, MemorySwarms):
            self.shared.unregister(self.root.name)
        self.me = Peer(self.root.name, address, self._zone)
        if isinstance(self.shared, MemorySwarms):
            self.shared.register(self.me, LIVES, time.monotonic())
        elif self.shared is not None:
            asyncio.run(_register(self.shared, self.me))

    def stop(self) -> None:
        self._server.stop()
        self._store.close()

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def settings(self) -> ClusterSettings:
        """As the node's agent hands them to a staging process."""
        assert not isinstance(self.shared, MemorySwarms)
        limits = self._limits or Limits()
        return ClusterSettings(
            self.me, self.shared, self.others, timeouts=self._timeouts, limits=limits, grace=self._grace
        )

    def cluster(self) -> Cluster:
        """What shares memory with the other nodes."""
        assert isinstance(self.shared, MemorySwarms)
        tracker = self._wrap(MemoryTracker(self.shared, self.me, time.monotonic))
        client = PeerClient(timeouts=self._timeouts)
        return Cluster(self.me, tracker, client, limits=self._limits, grace=self._grace)

    def job(self, reference: str, **request: Any) -> StagingJob:
        values: dict[str, Any] = {
            "chunk": CHUNK,
            "options": PATIENT,
            "limits": StagerLimits(span=16 * CHUNK, connections=8, reserve=0),
            "workers": 1,
            "domain": "default",
            **request,
        }
        cluster = self.cluster if isinstance(self.shared, MemorySwarms) else self.settings
        return StagingJob(StageRequest(reference, str(self.root), **values), Progress(), cluster=cluster)

    def stage(self, reference: str, **request: Any) -> StageReport:
        return self.job(reference, **request).start().wait()

    def files(self) -> dict[str, bytes]:
        return visible(self.root)

    def announce(self) -> None:
        """As the node's agent does: all that its store has."""
        domain = self._store.domain()
        for snapshot in domain.snapshots():
            numbering = Numbering.of(snapshot.manifest(), domain.name)
            swarm = Swarm(snapshot.id, numbering.chunks)
            assert isinstance(self.shared, MemorySwarms)
            self.shared.announce(self.me, swarm, numbering.bitmap(domain), time.monotonic())


async def _register(settings: TrackerSettings, me: Peer) -> None:
    tracker = RedisTracker(settings, me)
    try:
        await tracker.register(me, LIVES)
    finally:
        await tracker.close()


@contextmanager
def relay(mode: str, behind: str) -> Iterator[str]:
    """A program that passes on what a peer server says, with faults (see `faulty_relay`); its address."""
    address = f"127.0.0.1:{free(1)[0]}"
    command = [sys.executable, "-m", "support.faulty_relay", mode, address, behind]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "the relay did not start"
            yield address
        finally:
            process.kill()


def stage_together(nodes: list[Node], reference: str, **request: Any) -> list[StageReport]:
    """All of them at once."""
    jobs = [node.job(reference, **request) for node in nodes]
    for job in jobs:
        job.start()
    return [job.wait() for job in jobs]
