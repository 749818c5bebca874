"""The tracker of nodes that share nothing: each asks the others for their maps.

Who else belongs to a swarm is who has a map of it. Among these every chunk has an owner by rendezvous hashing,
the same wherever it is worked out, and the owner alone reads it from the origin. An owner that does not answer,
or gets nowhere, is left out after a while, and the next in its order takes its place. So each island of a
partition reads by itself, and so do nodes that do not know of each other yet.

Used for a few nodes with fixed addresses, and in place of Redis while that cannot be reached. Nothing is kept: the
maps are those of the stores.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headrace.cache.errors import ClusterError, PeerMissing
from headrace.cache.policy.rendezvous import owner
from headrace.cache.tracker.protocol import MAX_HOLDERS, Answer, Exchange, Peer, Swarm

ASKED = 16
"""Members asked for their maps at once, besides the owners of what is wanted, at most."""
_LONGEST_PAUSE = 10.0
_log = logging.getLogger(__name__)


class Maps(Protocol):
    """What gives other nodes' maps: a `PeerClient`."""

    async def held(self, peer: Peer, domain: str, snapshot_id: str, chunks: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """All in seconds.

    Attributes:
        fresh: a map is not asked for again within this time.
        wait: an exchange waits for maps this long; those that come later count for the next.
        settle: nothing is claimed so soon after the first exchange of a swarm: what others were reading until then
            shows in their maps.
        silent: how long a node that does not answer still owns its chunks.
        stuck: how long one does whose map stays the same while others get on. Where nobody does, one node after
            the other loses patience, each after as long again.
        missing: how long a node that has no map of a swarm is not asked for it again.
    """

    fresh: float = 0.5
    wait: float = 0.5
    settle: float = 1.0
    silent: float = 5.0
    stuck: float = 30.0
    missing: float = 3.0


@dataclass(slots=True)
class _Map:
    """What is known of one member in one swarm.

    Attributes:
        bits: chunks that it holds; None: never said, or it has no map.
        part: whether it belongs to the swarm; None: not known yet.
        answered, changed: when it last answered, and with something else than before.
        next: not asked before.
        failures: in a row.
    """

    answered: float
    changed: float
    bits: int | None = None
    part: bool | None = None
    next: float = float("-inf")
    failures: int = 0


@dataclass(slots=True)
class _View:
    """One swarm. `advanced`: when any node was last seen to have got on."""

    begun: float
    advanced: float
    maps: dict[str, _Map] = field(default_factory=dict)
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    owners: dict[int, str | None] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()


class PeerTracker:
    """One node's own view of what the others have: a `Tracker`.

    Args:
        me: this node, under the address by which the others know it.
        peers: the members, without or with this node; see `know`.
        domain: whose snapshots it asks for.
    """

    def __init__(
        self,
        me: Peer,
        peers: Iterable[Peer],
        maps: Maps,
        domain: str,
        *,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._me = me
        self._maps = maps
        self._domain = domain
        self._patience = patience or Patience()
        self._clock = clock
        self._random = random.Random(seed)
        self._views: dict[Swarm, _View] = {}
        self._peers: dict[str, Peer] = {}
        self.know(peers)

    def know(self, peers: Iterable[Peer]) -> None:
        """These are the members from now on; of one address the last."""
        self._peers = {peer.address: peer for peer in peers if peer.address != self._me.address}

    # Members

    async def register(self, peer: Peer, seconds: float) -> bool:
        self._me = peer
        return False

    async def unregister(self) -> None:
        pass

    async def members(self) -> list[Peer]:
        return sorted([self._me, *self._peers.values()], key=lambda peer: peer.id)

    # Swarms

    async def announce(self, swarm: Swarm, have: bytes) -> None:
        pass

    async def leave(self, swarm: Swarm) -> None:
        self._forget(swarm)

    async def exchange(self, swarm: Swarm, request: Exchange) -> Answer:
        view = self._view(swarm)
        if request.gained:
            view.advanced = self._clock()
        if not request.wanted:
            return Answer()
        for chunk, node in request.missing:
            for address, known in view.maps.items():
                peer = self._peers.get(address)
                if known.bits is not None and peer is not None and peer.id == node:
                    known.bits &= ~(1 << chunk)
        await self._refresh(swarm, view, request.wanted)
        return self._answer(swarm, view, request.wanted, request.claims)

    async def look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        view = self._view(swarm)
        await self._refresh(swarm, view, chunks)
        holders = {chunk: some for chunk in chunks if (some := self._holders(view, chunk))}
        return Answer(
            {chunk: self._sample(some) for chunk, some in holders.items()},
            counts={chunk: len(holders.get(chunk, ())) for chunk in chunks},
        )

    def _answer(self, swarm: Swarm, view: _View, wanted: Sequence[int], claims: int) -> Answer:
        holders: dict[int, tuple[Peer, ...]] = {}
        claimed: list[int] = []
        reading: list[int] = []
        counts: dict[int, int] = {}
        now = self._clock()
        candidates = self._candidates(view, now)
        if candidates != view.candidates:
            view.candidates = candidates
            view.owners.clear()
        settled = now - view.begun >= self._patience.settle or not self._peers
        for chunk in wanted:
            some = self._holders(view, chunk)
            counts[chunk] = len(some)
            if some:
                holders[chunk] = self._sample(some)
                continue
            if chunk not in view.owners:
                view.owners[chunk] = owner(swarm.id, chunk, candidates)
            if view.owners[chunk] != self._me.address or not settled:
                reading.append(chunk)
            elif len(claimed) < claims:
                claimed.append(chunk)
        return Answer(holders, tuple(claimed), tuple(reading), counts)

    def _holders(self, view: _View, chunk: int) -> list[Peer]:
        return [
            self._peers[address]
            for address, known in view.maps.items()
            if known.bits is not None and known.bits >> chunk & 1 and address in self._peers
        ]

    def _sample(self, holders: list[Peer]) -> tuple[Peer, ...]:
        """A few at random, those of the own zone first, but one of another."""
        self._random.shuffle(holders)
        near = [peer for peer in holders if peer.zone == self._me.zone]
        far = [peer for peer in holders if peer.zone != self._me.zone]
        few = near[: MAX_HOLDERS - min(1, len(far))]
        return tuple(few + far[: MAX_HOLDERS - len(few)])

    def _candidates(self, view: _View, now: float) -> tuple[str, ...]:
        """Who may own chunks: this node, and whoever takes part and gets on, or was not heard yet."""
        found = [self._me.address]
        place = sum(address < self._me.address for address in self._peers)
        for address in self._peers:
            known = view.maps.get(address)
            if known is None or (
                known.part is not False
                and now - known.answered < self._patience.silent
                and view.advanced - known.changed < self._patience.stuck
                and now - known.changed < self._patience.stuck * (2 + place)
            ):
                found.append(address)
        return tuple(sorted(found))

    # Maps

    def _view(self, swarm: Swarm) -> _View:
        now = self._clock()
        return self._views.setdefault(swarm, _View(now, now))

    async def _refresh(self, swarm: Swarm, view: _View, chunks: Sequence[int]) -> None:
        """Ask members for their maps, as far as those known are old."""
        now = self._clock()
        for address in [address for address in view.maps if address not in self._peers]:
            del view.maps[address]
        due = [
            address
            for address in self._peers
            if address not in view.asking and (address not in view.maps or view.maps[address].next <= now)
        ]
        if len(due) > ASKED:
            owners = {view.owners.get(chunk) for chunk in chunks}
            first = [address for address in due if address in owners]
            rest = [address for address in due if address not in owners]
            due = first + self._random.sample(rest, min(ASKED, len(rest)))
        for address in due:
            view.asking[address] = asyncio.create_task(self._ask(swarm, view, self._peers[address]))
        # Nobody waits for those that did not answer before: most likely they will not now.
        awaited = [task for address, task in view.asking.items() if not self._failing(view, address)]
        if awaited:
            await asyncio.wait(awaited, timeout=self._patience.wait)

    @staticmethod
    def _failing(view: _View, address: str) -> bool:
        return address in view.maps and view.maps[address].failures > 0

    async def _ask(self, swarm: Swarm, view: _View, peer: Peer) -> None:
        begun = self._clock()
        known = view.maps.setdefault(peer.address, _Map(begun, begun))
        try:
            have = await self._maps.held(peer, self._domain, swarm.id, swarm.chunks)
        except PeerMissing:
            known.part, known.bits, known.failures = False, None, 0
            known.answered = self._clock()
            # Nodes that start together have their first map within moments.
            young = known.answered - view.begun < self._patience.missing
            known.next = known.answered + (self._patience.fresh if young else self._patience.missing)
        except ClusterError as error:
            # Also one of another version, or without our secret: it is of no use, whatever it has.
            _log.debug("no map from %s: %s", peer.address, error)
            known.failures += 1
            known.next = self._clock() + min(self._patience.fresh * 2.0**known.failures, _LONGEST_PAUSE)
            if self._clock() - known.answered >= self._patience.silent:
                known.bits = None
        else:
            bits = int.from_bytes(have, "little")
            now = self._clock()
            if bits != known.bits:
                known.changed = view.advanced = now
            elif known.failures:
                known.changed = now
            known.part, known.bits, known.failures = True, bits, 0
            known.answered = now
            known.next = now + self._patience.fresh
        finally:
            view.asking.pop(peer.address, None)

    def _forget(self, swarm: Swarm) -> None:
        view = self._views.pop(swarm, None)
        for task in [] if view is None else list(view.asking.values()):
            task.cancel()

    # Values

    async def add_kin(self, key: str, snapshot_id: str) -> None:
        pass

    async def kin(self, key: str) -> list[str]:
        return []

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        return await ask()

    async def remember(self, key: str, value: bytes, seconds: float) -> None:
        pass

    async def recall(self, key: str) -> bytes | None:
        return None

    async def close(self) -> None:
        tasks = [task for view in self._views.values() for task in view.asking.values()]
        for swarm in list(self._views):
            self._forget(swarm)
        await asyncio.gather(*tasks, return_exceptions=True)
