"""The agent's part in the cluster: it serves its store to other nodes and says that it is there.

With nothing in `[peers]` it does nothing at all: the node stages alone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import asdict
from typing import Any

from headrace.cache.bandwidth import Bandwidth
from headrace.cache.peers.server import PeerServer, PeerStats
from headrace.cache.store import Store
from headrace.cache.tracker.protocol import Peer
from headrace.prefetch.settings import AgentSettings, security_files

log = logging.getLogger(__name__)


class Membership:
    """Peer server and heartbeat. Used by the agent's event loop only.

    Attributes:
        me: this node as others see it; None while it serves nobody.
        members: other nodes that are known.
        degraded: whether a tracker is configured that cannot be reached.
        calls, errors: of the tracker by this process.
    """

    def __init__(self, settings: AgentSettings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._bandwidth = Bandwidth()
        self._server: PeerServer | None = None
        self.me: Peer | None = None
        self.members: tuple[Peer, ...] = ()
        self.degraded = False
        self.calls = self.errors = 0

    async def start(self) -> None:
        """Serve, and be known.

        Raises:
            NotAuthenticated: a secret or certificate is missing or wrong, or none is there and others could connect.
            UsageError: it cannot listen there.
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
        log.info("serving other nodes at %s", self.me.address)

    async def stop(self) -> None:
        """Be known no more, and let uploads end."""
        if self._server is not None:
            server, self._server = self._server, None
            await asyncio.to_thread(server.stop, self._settings.drain)

    async def apply(self, settings: AgentSettings) -> None:
        """Other secrets and rates, at once.

        Raises:
            NotAuthenticated: they are wrong; nothing was changed.
        """
        if self._server is not None:
            self._server.reload(security_files(settings).load())
        self._pace(settings)
        self._settings = settings

    def changed(self) -> None:
        """The store has more than before."""

    def removed(self, domain: str, snapshot: str) -> None:
        """A snapshot has left the store."""

    def for_processes(self) -> dict[str, Any] | None:
        """What staging processes are told of the cluster."""
        return None

    def uploads(self) -> PeerStats:
        return PeerStats() if self._server is None else self._server.stats()

    def status(self) -> dict[str, Any]:
        if self.me is None:
            return {"enabled": False}
        return {
            "enabled": True,
            "me": asdict(self.me),
            "members": [asdict(peer) for peer in self.members],
            "degraded": self.degraded,
            "uploads": asdict(self.uploads()),
        }

    def _pace(self, settings: AgentSettings) -> None:
        """Uploads: the node's rate bounds each class, and so does the class's own."""
        bandwidth = settings.bandwidth
        for of, own in (("demand", bandwidth.demand), ("prestage", bandwidth.prestage)):
            limits = [rate for rate in (bandwidth.total.uploads, own.uploads) if rate]
            self._bandwidth.set_rate(
                "peers", "demand" if of == "demand" else "prestage", min(limits, default=None)
            )
