"""The simulated cluster: nodes that run the policy, one tracker, links, and the events between them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from random import Random

from benchmarks.simulator.case import Case, llama
from benchmarks.simulator.curve import Curve, Tensors
from benchmarks.simulator.links import Link, Network, Queued, Shared, Transfer

from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.scheduler import Scheduler
from headrace.cache.policy.uploads import Uploads
from headrace.cache.tracker.memory import MemorySwarms
from headrace.cache.tracker.protocol import Answer, Exchange, Peer, Swarm

EXACT = 64
"""So many nodes at most are simulated with links that are shared at every moment, unless asked."""
CURVES = 100
"""So many nodes at most have their tensor-completion curve drawn up."""
_FOREVER = 1e9
_DONE, _BUSY, _FAILED = Outcome.DONE, Outcome.BUSY, Outcome.FAILED

Said = Callable[[float, int, Exchange], None]


class Node:
    """One node.

    Attributes:
        flying: its transfers, by their number in the policy.
        uploads: transfers from it, and when they began; uploading: the same by chunk.
        wake_at: when it is looked at next if nothing happens to it.
        finished: when it had everything; infinite before.
        here: chunks that it has, verified.
    """

    __slots__ = (
        "curve",
        "dead",
        "down",
        "finished",
        "flying",
        "here",
        "joined",
        "number",
        "peer",
        "scheduler",
        "slow",
        "up",
        "uploading",
        "uploads",
        "wake_at",
        "warm",
        "zone",
    )

    def __init__(self, number: int, peer: Peer, zone: int, up: float, down: float) -> None:
        self.number = number
        self.peer = peer
        self.zone = zone
        self.up = Link(up)
        self.down = Link(down)
        self.scheduler: Scheduler
        self.flying: dict[int, Transfer] = {}
        self.uploads: dict[Transfer, float] = {}
        self.uploading = Uploads()
        self.wake_at = inf
        self.joined = 0.0
        self.finished = inf
        self.here = bytearray()
        self.curve: Curve | None = None
        self.dead = self.warm = self.slow = False


@dataclass(slots=True)
class Counts:
    """What was counted. Bytes of transfers that were cut are not among them."""

    origin: int = 0
    peers: int = 0
    far: int = 0
    cut: int = 0
    arrived: int = 0
    calls: int = 0
    told: int = 0
    asked: int = 0
    busy: int = 0
    failed: int = 0
    hedges: int = 0


class World:
    """One run of one case."""

    def __init__(self, case: Case, said: Said | None = None) -> None:
        """
        Args:
            said: is told each call of the tracker: when, by which node, what.
        """
        self.case = case
        self.now = 0.0
        self.counts = Counts()
        self.sizes = case.sizes()
        self.swarm = Swarm("simulated", len(self.sizes))
        self.swarms = MemorySwarms(lease=case.lease, lifetime=_FOREVER, seed=case.seed)
        self._said = said
        self._events: list[tuple[float, int, Callable[..., None], object, object]] = []
        self._number = 0
        self._origin = Link(case.origin)
        self._out = [Link(case.zone_rate) for _ in range(case.zones)] if case.zone_rate < inf else []
        self._in = [Link(case.zone_rate) for _ in range(case.zones)] if case.zone_rate < inf else []
        exact = case.nodes <= EXACT if case.exact is None else case.exact
        self._network: Network = Shared(self._pass, self._turn) if exact else Queued(self._pass)
        self._random = Random(case.seed)
        self.nodes = [self._node(number) for number in range(case.nodes)]
        self._by_id = {node.peer.id: node for node in self.nodes}
        self._unfinished = len(self.nodes)
        self._spread(case)

    def run(self, until: float = _FOREVER) -> None:
        """Let everything happen until every living node has everything, or nothing happens any more."""
        collects = gc.isenabled()
        gc.freeze()
        gc.disable()
        events = self._events
        try:
            while events and self._unfinished:
                at, _, happen, a, b = heappop(events)
                if at > until:
                    break
                self.now = at
                happen(a, b)
        finally:
            gc.unfreeze()
            if collects:
                gc.enable()

    # The beginning.

    def _node(self, number: int) -> Node:
        case = self.case
        zone = number % case.zones
        name = str(zone) if case.zones > 1 else ""
        slow = number >= case.nodes - case.slow
        up = case.slow_rate if slow else case.up
        down = case.slow_rate if slow else case.down
        node = Node(number, Peer(f"node-{number}", f"10.0.0.1:{number}", name), zone, up, down)
        node.slow = slow
        node.here = bytearray(len(self.sizes))
        return node

    def _spread(self, case: Case) -> None:
        warm = set(range(case.nodes - case.cold))
        victims = self._random.sample(range(len(warm), case.nodes - case.slow), case.deaths)
        tensors = Tensors(case.tensors or llama(case.model), case.chunk, len(self.sizes))
        step = max(1, case.cold // CURVES)
        for node in self.nodes:
            node.warm = node.number in warm
            if not node.warm and node.number % step == 0:
                node.curve = Curve(tensors)
            share = node.number / case.nodes
            self._later(0.0 if node.warm else share * case.join_over, self._join, node, None)
        for turn, victim in enumerate(victims):
            at = case.death_at + case.death_spread * turn / len(victims)
            self._later(at, self._die, self.nodes[victim], None)

    def _join(self, node: Node, _: object) -> None:
        seed = self._random.getrandbits(63)
        node.scheduler = Scheduler(sizes=self.sizes, me=node.peer, seed=seed, limits=self.case.limits)
        node.joined = self.now
        self.swarms.register(node.peer, _FOREVER, self.now)
        if node.warm:
            everything = range(len(self.sizes))
            node.here = bytearray(b"\1" * len(self.sizes))
            node.scheduler.present(everything, self.now)
            node.finished = self.now
            self._unfinished -= 1
        # Nobody starts in the same microsecond.
        self._wake_at(node, self.now + self._random.random() * 0.001)

    def _die(self, node: Node, _: object) -> None:
        node.dead = True
        if node.finished == inf:
            self._unfinished -= 1
        for transfer in list(node.flying.values()):
            self._network.cut(transfer, self.now)
            self._uploaded(transfer, whole=False)
        for transfer in list(node.uploads):
            self._network.cut(transfer, self.now)
            transfer.over = False
            self._later(self.now + self.case.latency, self._fail, transfer, _FAILED)
        node.flying.clear()
        node.uploads.clear()
        self._later(self.now + self.case.noticed, self._forget, node, None)

    def _forget(self, node: Node, _: object) -> None:
        self.swarms.unregister(node.peer.id)

    # Events.

    def _later(self, at: float, happen: Callable[..., None], a: object, b: object) -> None:
        self._number += 1
        heappush(self._events, (at, self._number, happen, a, b))

    def _turn(self, at: float, link: Link, turn: int) -> None:
        self._later(at, self._turned, link, turn)

    def _turned(self, link: Link, turn: int) -> None:
        assert isinstance(self._network, Shared)
        self._network.turn(link, turn, self.now)

    def _pass(self, at: float, transfer: Transfer) -> None:
        self._number += 1
        heappush(self._events, (at + self.case.overhead, self._number, self._arrive, transfer, None))

    def _wake_at(self, node: Node, at: float) -> None:
        node.wake_at = at
        self._number += 1
        heappush(self._events, (at, self._number, self._wake, node, at))

    def _wake(self, node: Node, at: float) -> None:
        if at == node.wake_at:
            node.wake_at = inf
            self._step(node)

    def _step(self, node: Node) -> None:
        """What every driver of the policy does after an event."""
        if node.dead:
            return
        now, scheduler = self.now, node.scheduler
        request = scheduler.ask(now)
        if request is not None:
            self._call(node, request)
        for fetch in scheduler.start(now):
            self._fetch(node, fetch)
        at = scheduler.wake(now)
        if at < node.wake_at:
            self._wake_at(node, at if at > now else now + 1e-6)

    def _call(self, node: Node, request: Exchange) -> None:
        counts = self.counts
        counts.calls += 1
        counts.told += len(request.gained)
        counts.asked += len(request.wanted)
        if self._said is not None:
            self._said(self.now, node.number, request)
        answer = self.swarms.exchange(node.peer, self.swarm, request, self.now)
        self._later(self.now + self.case.tracker, self._answered, node, (request, answer))

    def _answered(self, node: Node, both: tuple[Exchange, Answer]) -> None:
        if not node.dead:
            node.scheduler.answered(both[0], both[1], self.now)
            self._step(node)

    def _fetch(self, node: Node, fetch: Fetch) -> None:
        case, now, chunk = self.case, self.now, fetch.chunk
        size = self.sizes[chunk]
        if fetch.peer is None:
            transfer = Transfer(fetch, size, node.number, -1)
            node.flying[fetch.number] = transfer
            earliest = now + case.first_byte + size / case.connection
            self._network.begin(transfer, (self._origin, node.down), earliest, now)
            return
        source = self._by_id[fetch.peer.id]
        transfer = Transfer(fetch, size, node.number, source.number)
        node.flying[fetch.number] = transfer
        if fetch.hedges is not None:
            self.counts.hedges += 1
        trip = case.latency if source.zone == node.zone else case.far
        if source.dead:
            self._later(now + trip, self._fail, transfer, _FAILED)
        elif len(source.uploads) >= case.slots or source.uploading.full(chunk, now):
            self._later(now + trip, self._fail, transfer, _BUSY)
        else:
            source.uploads[transfer] = now
            source.uploading.begin(chunk, now)
            links: tuple[Link, ...] = (source.up, node.down)
            if self._out and source.zone != node.zone:
                links = (source.up, self._out[source.zone], self._in[node.zone], node.down)
            self._network.begin(transfer, links, now + trip, now)

    def _arrive(self, transfer: Transfer, _: object) -> None:
        if transfer.over:
            return
        transfer.over = True
        counts, fetch, size = self.counts, transfer.fetch, transfer.size
        node = self.nodes[transfer.to]
        del node.flying[fetch.number]
        queue = 0
        if transfer.source < 0:
            counts.origin += size
        else:
            source = self.nodes[transfer.source]
            self._uploaded(transfer, whole=True)
            queue = len(source.uploads)
            counts.peers += size
            if source.zone != node.zone:
                counts.far += size
        scheduler = node.scheduler
        losers = scheduler.finished(fetch, _DONE, self.now, queue)
        if not node.here[fetch.chunk]:
            node.here[fetch.chunk] = 1
            counts.arrived += size
            if node.curve is not None:
                node.curve.arrived(fetch.chunk)
        for loser in losers:
            self._cancel(node, loser)
        if node.finished == inf and scheduler.complete:
            node.finished = self.now
            self._unfinished -= 1
        self._step(node)

    def _cancel(self, node: Node, fetch: Fetch) -> None:
        transfer = node.flying.pop(fetch.number)
        self._network.cut(transfer, self.now)
        self.counts.cut += transfer.size
        self._uploaded(transfer, whole=False)
        node.scheduler.finished(fetch, Outcome.CANCELLED, self.now)

    def _uploaded(self, transfer: Transfer, *, whole: bool) -> None:
        if transfer.source < 0:
            return
        source = self.nodes[transfer.source]
        began = source.uploads.pop(transfer, None)
        if began is not None:
            source.uploading.end(transfer.fetch.chunk, began, self.now, whole=whole)

    def _fail(self, transfer: Transfer, outcome: Outcome) -> None:
        node = self.nodes[transfer.to]
        if transfer.over or node.dead:
            return
        transfer.over = True
        del node.flying[transfer.fetch.number]
        if outcome is _BUSY:
            self.counts.busy += 1
        else:
            self.counts.failed += 1
        node.scheduler.finished(transfer.fetch, outcome, self.now, self.case.slots)
        self._step(node)
