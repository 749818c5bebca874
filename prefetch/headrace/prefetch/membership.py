"""The agent's part in the cluster: it serves its store to other nodes, says that it lives, and what it holds.

With nowhere to listen in `[peers]` it does nothing at all: the node stages alone.

Crash story. Nothing is kept. A node that is killed is taken for gone after three heartbeats, and what it held
goes with it; the next agent of the node is another member and announces what it finds in the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import asdict, replace
from typing import Any

from headrace.cache.bandwidth import Bandwidth
from headrace.cache.cluster import Cluster, ClusterSettings
from headrace.cache.errors import HeadraceError, TrackerUnavailable
from headrace.cache.numbering import Numbering
from headrace.cache.peers.server import PeerServer, PeerStats
from headrace.cache.store import Store
from headrace.cache.tracker.failover import FailoverTracker
from headrace.cache.tracker.protocol import Peer, Swarm
from headrace.prefetch.settings import AgentSettings, security_files

_BEATS = 3
"""Heartbeats that may be missed."""
_GOODBYE = 2.0  # seconds for taking leave of the tracker

log = logging.getLogger(__name__)


class Membership:
    """Peer server and heartbeat. Used by the agent's event loop only.

    Attributes:
        me: this node as others see it; None while it serves nobody.
        members: other nodes that are known.
        announced: the swarms of snapshots that the tracker was told of.
        calls: of the tracker by this process.
        lost: how often the tracker was given up for a time.
    """

    def __init__(self, settings: AgentSettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._bandwidth = Bandwidth()
        self._server: PeerServer | None = None
        self._cluster: Cluster | None = None
        self._beating: asyncio.Task[None] | None = None
        self._due = asyncio.Event()
        self.announced: dict[str, Swarm] = {}
        self._renew_at = 0.0
        self.me: Peer | None = None
        self.members: tuple[Peer, ...] = ()
        self.calls = self.lost = 0

    async def start(self) -> None:
        """Serve, and be known.

        Raises:
            NotAuthenticated: a secret or certificate is missing or wrong, or none is there and others could connect.
            UsageError: it cannot listen there.
            MissingDependency: the tracker's library is not installed.
        """
        peers = self._settings.peers
        if not peers["listen"]:
            return
        security = security_files(self._settings).load()
        host, _, port = peers["listen"].rpartition(":")
        node = uuid.uuid4().hex
        self._pace(self._settings)
        address = self._settings.address
        server = PeerServer(
            self._store,
            security,
            listen=(host.strip("[]"), int(port)),
            slots=peers["slots"],
            bandwidth=self._bandwidth,
            node=node,
            names=(address,) if address else (),
        )
        server.start()
        self._server = server
        self.me = Peer(node, address or server.address, self._settings.zone)
        self.members = self._static()
        log.info("serving other nodes at %s", self.me.address)
        self._cluster = Cluster.open(self._settings_of(self.me), self._settings.config.domain, self._lost)
        if self._settings.tracker is not None:
            self._beating = asyncio.create_task(self._beat(self._cluster, self.me), name="heartbeat")

    async def stop(self) -> None:
        """Be known no more, and let uploads end."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            try:
                async with asyncio.timeout(_GOODBYE):
                    await cluster.tracker.unregister()
            except (TimeoutError, TrackerUnavailable) as error:
                # It is taken for gone a few heartbeats later.
                log.info("the tracker was not told of the end: %s", error)
            await cluster.close()
        if self._server is not None:
            server, self._server = self._server, None
            await asyncio.to_thread(server.stop, self._settings.drain)

    async def apply(self, settings: AgentSettings) -> None:
        """Other secrets and rates, at once.

        Raises:
            NotAuthenticated: they are wrong; nothing was changed.
        """
        if self._server is not None:
            security = security_files(settings).load()
            self._server.reload(security)
            if self._cluster is not None:
                self._cluster.client.reload(security)
        self._pace(settings)
        self._settings = settings

    def changed(self) -> None:
        """The store has something else than before: say so soon."""
        self._renew_at = 0.0
        self._due.set()

    def for_processes(self) -> dict[str, Any] | None:
        """What staging processes are told of the cluster: with those seen last, in case the tracker is lost."""
        if self.me is None:
            return None
        known = {peer.address: peer for peer in (*self._static(), *self.members)}
        return replace(self._settings_of(self.me), static=tuple(known.values())).as_json()

    def uploads(self) -> PeerStats:
        return PeerStats() if self._server is None else self._server.stats()

    @property
    def degraded(self) -> bool:
        """Whether a tracker is configured that cannot be reached."""
        tracker = None if self._cluster is None else self._cluster.tracker
        return isinstance(tracker, FailoverTracker) and tracker.degraded

    def status(self) -> dict[str, Any]:
        if self.me is None:
            return {"enabled": False}
        return {
            "enabled": True,
            "me": asdict(self.me),
            "members": [asdict(peer) for peer in self.members],
            "tracker": self._settings.tracker.place if self._settings.tracker else None,
            "degraded": self.degraded,
            "announced": len(self.announced),
            "uploads": asdict(self.uploads()),
        }

    # -- the heartbeat

    async def _beat(self, cluster: Cluster, me: Peer) -> None:
        """Live, learn who else does, and announce what is held when it is new or about to be forgotten."""
        every = max(0.1, self._settings.peers["heartbeat"])
        while True:
            try:
                await self._once(cluster, me, every)
            except TrackerUnavailable as error:
                log.warning("the tracker does not answer: %s", error)
            except HeadraceError as error:
                log.error("the heartbeat failed: %s", error)
            except Exception:
                # Without heartbeats the node is dead to the others: what is not foreseen must not end them.
                log.exception("the heartbeat failed")
            try:
                async with asyncio.timeout(every):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()

    async def _once(self, cluster: Cluster, me: Peer, every: float) -> None:
        assert self._settings.tracker is not None
        tracker = cluster.tracker
        self.calls += 2
        unknown = await tracker.register(me, _BEATS * every)
        self.members = tuple(peer for peer in await tracker.members() if peer.id != me.id)
        held = set(await asyncio.to_thread(self._snapshots))
        for gone in [snapshot for snapshot in self.announced if snapshot not in held]:
            # Evicted, by this agent or another process.
            self.calls += 1
            await tracker.leave(self.announced.pop(gone))
        if not unknown and time.monotonic() < self._renew_at and held <= set(self.announced):
            return
        # Well before the keys expire.
        self._renew_at = time.monotonic() + self._settings.tracker.lifetime / 3
        for snapshot in held:
            found = await asyncio.to_thread(self._held, snapshot)
            if found is not None:
                self.calls += 1
                swarm, have = found
                await tracker.announce(swarm, have)
                self.announced[snapshot] = swarm

    def _snapshots(self) -> list[str]:
        return [snapshot.id for domain in self._store.domains() for snapshot in domain.snapshots()]

    def _held(self, snapshot_id: str) -> tuple[Swarm, bytes] | None:
        """What of a snapshot is here, complete or not."""
        for domain in self._store.domains():
            snapshot = domain.snapshot(snapshot_id)
            try:
                numbering = Numbering.of(snapshot.manifest(), domain.name)
            except HeadraceError:
                continue  # another domain's, evicted meanwhile, or damaged
            return Swarm(snapshot_id, numbering.chunks), numbering.bitmap(domain)
        return None

    def _lost(self, text: str) -> None:
        self.lost += 1

    def _static(self) -> tuple[Peer, ...]:
        return tuple(Peer(address, address) for address in self._settings.peers["static"])

    def _settings_of(self, me: Peer) -> ClusterSettings:
        return ClusterSettings(me, self._settings.tracker, self._static(), security_files(self._settings))

    def _pace(self, settings: AgentSettings) -> None:
        """Uploads: the node's rate bounds each class, and so does the class's own."""
        total, bandwidth = settings.bandwidth.total, settings.bandwidth
        for of, own in (("demand", bandwidth.demand), ("prestage", bandwidth.prestage)):
            limits = [rate for rate in (total.uploads, own.uploads) if rate]
            self._bandwidth.set_rate(
                "peers", "demand" if of == "demand" else "prestage", min(limits, default=None)
            )
