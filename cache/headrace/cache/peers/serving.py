"""What all connections of a peer server share."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from headrace.cache.bandwidth import CLASSES, Bandwidth, Class
from headrace.cache.peers.opened import OpenObjects
from headrace.cache.peers.security import Security
from headrace.cache.peers.shelf import Shelf
from headrace.cache.peers.slots import Slots
from headrace.cache.peers.tokens import Replays
from headrace.cache.receiving import Blocks
from headrace.cache.store import Store

_LEAST_WAIT, _MOST_WAIT = 0.02, 2.0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds.

    Attributes:
        connections: at once; more are closed at once.
        idle: seconds that a connection may rest between requests.
        head: seconds that a request's headers, or a TLS handshake, may take.
        send: seconds that a reader may take for a mebibyte, or for an answer that is no chunk.
    """

    connections: int = 512
    idle: float = 60.0
    head: float = 10.0
    send: float = 20.0


class Counts:
    """What was sent and refused so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent: dict[Class, int] = dict.fromkeys(CLASSES, 0)
        self.uploads: dict[Class, int] = dict.fromkeys(CLASSES, 0)
        self.busy = 0
        self.refused = 0

    def add(self, of: Class, size: int) -> None:
        with self.lock:
            self.sent[of] += size

    def done(self, of: Class) -> None:
        with self.lock:
            self.uploads[of] += 1


class Serving:
    """What all connections of a server share."""

    def __init__(
        self,
        store: Store,
        security: Security,
        slots: int,
        bandwidth: Bandwidth,
        node: str,
        names: tuple[str, ...],
        limits: ServerLimits,
    ) -> None:
        self.security = security
        self.slots = Slots(slots)
        self.bandwidth = bandwidth
        self.node = node
        self.names = names
        self.limits = limits
        self.objects = OpenObjects()
        self.shelf = Shelf(store)
        self.replays = Replays()
        self.blocks = Blocks()
        self.counts = Counts()
        self.draining = False
        self.reloaded = 0
        """How often `security` was exchanged: connections from before end with their answer."""

    def until_free(self) -> float:
        """Seconds after which one is likely to be free."""
        return min(_MOST_WAIT, max(_LEAST_WAIT, self.slots.seconds / self.slots.count))
