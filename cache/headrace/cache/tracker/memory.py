"""The tracker in one process: for simulations, and the model that the others are compared with.

`MemorySwarms` is what all nodes share: plain data, no I/O, no waiting, the time given by the caller. `MemoryTracker`
is one node's way to it. Answers are those that Redis gives, up to the choice of holders.

Holders of a chunk are kept as one short list per zone: a random one costs the same however many there are.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from headrace.cache.tracker.once import once
from headrace.cache.tracker.protocol import (
    MAX_HOLDERS,
    MAX_KIN,
    SETTLED,
    Answer,
    Exchange,
    Peer,
    Swarm,
)

NEAR = MAX_HOLDERS - 1
"""Holders of the asking node's zone, at most, where there are others."""


@dataclass(slots=True)
class _Node:
    """A node that lives until its time is over. `told`: that it is new here."""

    peer: Peer
    until: float
    told: bool = False


@dataclass(slots=True)
class _Member:
    """What one node has to do with one swarm."""

    peer: Peer
    have: bytearray
    gained: float = float("-inf")


@dataclass(slots=True)
class _Swarm:
    """What is known of one swarm: members, and for each chunk its holders by zone, its claim and its digest."""

    holders: list[dict[str, list[str]]]
    counts: list[int]
    until: float
    members: dict[str, _Member] = field(default_factory=dict)
    claims: dict[int, tuple[str, float]] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)


class MemorySwarms:
    """What all nodes share.

    Args:
        lease: seconds for which a claim is granted or kept.
        lifetime: seconds for which a swarm is kept that nobody says anything of.
        settled: see `SETTLED`.
        seed: of the choice among holders.
    """

    def __init__(
        self, *, lease: float = 10.0, lifetime: float = 3600.0, settled: float = SETTLED, seed: int = 0
    ) -> None:
        self.lease = lease
        self.lifetime = lifetime
        self._settled = settled
        self._random = random.Random(seed).random
        self._nodes: dict[str, _Node] = {}
        self._due = float("inf")  # no node's time is over before
        self._swarms: dict[Swarm, _Swarm] = {}
        self._values: dict[str, tuple[bytes, float, float]] = {}
        self._locks: dict[str, tuple[str, float]] = {}
        self._kin: dict[str, list[str]] = {}

    # Members

    def register(self, peer: Peer, seconds: float, now: float) -> bool:
        """See `Tracker.register`."""
        self.reap(now, but=peer.id)
        new = not self._lives(peer.id, now) or not self._nodes[peer.id].told
        self._admit(peer, now + seconds, told=True)
        return new

    def unregister(self, node: str) -> None:
        if self._nodes.pop(node, None) is not None:
            for swarm in self._swarms.values():
                self._drop(swarm, node)

    def members(self, now: float) -> list[Peer]:
        living = (node.peer for node in self._nodes.values() if node.until > now)
        return sorted(living, key=lambda peer: peer.id)

    def reap(self, now: float, but: str = "") -> None:
        """Forget nodes (`but` one), swarms and values whose time is over."""
        if now < self._due:
            return
        for name in [name for name, node in self._nodes.items() if node.until <= now and name != but]:
            self.unregister(name)
        self._due = min((node.until for node in self._nodes.values()), default=float("inf"))
        for key in [key for key, swarm in self._swarms.items() if swarm.until <= now]:
            del self._swarms[key]
        for name in [name for name, (_, _, until) in self._values.items() if until <= now]:
            del self._values[name]

    def _lives(self, node: str, now: float) -> bool:
        known = self._nodes.get(node)
        return known is not None and known.until > now

    def _admit(self, peer: Peer, until: float, *, told: bool) -> None:
        self._nodes[peer.id] = _Node(peer, until, told)
        self._due = min(self._due, until)

    # Swarms

    def announce(self, me: Peer, swarm: Swarm, have: bytes, now: float) -> None:
        """See `Tracker.announce`."""
        state = self._open(swarm, now)
        member = self._join(state, me, swarm.chunks, now)
        settled = member.gained <= now - self._settled
        bits = int.from_bytes(have, "little")
        for chunk in range(swarm.chunks):
            if bits >> chunk & 1:
                self._gain(state, me, member, chunk)
            elif settled:
                self._lose(state, me.id, chunk)

    def leave(self, me: Peer, swarm: Swarm, now: float) -> None:
        """See `Tracker.leave`."""
        state = self._live(swarm, now)
        if state is not None:
            self._drop(state, me.id)

    def exchange(self, me: Peer, swarm: Swarm, request: Exchange, now: float) -> Answer:
        """See `Tracker.exchange`."""
        state = self._open(swarm, now)
        member = self._join(state, me, swarm.chunks, now)
        here_no_more = [*((chunk, me.id) for chunk in request.lost), *request.missing]
        for chunk, holder in here_no_more:
            self._clear(state, holder, chunk)
        for chunk in request.give_back:
            if state.claims.get(chunk, ("", 0.0))[0] == me.id:
                del state.claims[chunk]
        if request.gained:
            member.gained = now
            for chunk in request.gained:
                self._gain(state, me, member, chunk)
                if state.claims.get(chunk, ("", 0.0))[0] == me.id:
                    del state.claims[chunk]
        for chunk, _ in here_no_more:
            self._unlearn(state, chunk)
        for chunk, digest in request.digests.items():
            state.digests.setdefault(chunk, digest)
        for chunk in request.keep:
            if not state.counts[chunk] and self._claimant(state, chunk, now) in (None, me.id):
                state.claims[chunk] = (me.id, now + self.lease)
        return self._answer(state, me, request.wanted, request.claims, now)

    def holders(self, swarm: Swarm, chunk: int) -> set[str]:
        """Ids of all nodes that hold a chunk."""
        state = self._swarms.get(swarm)
        return set() if state is None else set(chain.from_iterable(state.holders[chunk].values()))

    def look(self, me: Peer, swarm: Swarm, chunks: Sequence[int], now: float) -> Answer:
        """See `Tracker.look`."""
        state = self._live(swarm, now)
        if state is None:
            return Answer(counts=dict.fromkeys(chunks, 0))
        counts = {chunk: state.counts[chunk] for chunk in chunks}
        found = ((chunk, self._sample(state, chunk, me)) for chunk in chunks if counts[chunk])
        holders = {chunk: some for chunk, some in found if some}
        digests = {chunk: state.digests[chunk] for chunk in holders if chunk in state.digests}
        return Answer(holders=holders, counts=counts, digests=digests)

    def _answer(self, state: _Swarm, me: Peer, wanted: Sequence[int], claims: int, now: float) -> Answer:
        holders: dict[int, tuple[Peer, ...]] = {}
        claimed: list[int] = []
        reading: list[int] = []
        counts: dict[int, int] = {}
        digests: dict[int, bytes] = {}
        have = state.members[me.id].have
        for chunk in wanted:
            if have[chunk]:
                self._lose(state, me.id, chunk)
            counts[chunk] = count = state.counts[chunk]
            if count:
                holders[chunk] = self._sample(state, chunk, me)
                if chunk in state.digests:
                    digests[chunk] = state.digests[chunk]
                continue
            owner = self._claimant(state, chunk, now)
            if owner not in (None, me.id):
                reading.append(chunk)
            elif len(claimed) < claims:
                claimed.append(chunk)
                state.claims[chunk] = (me.id, now + self.lease)
        return Answer(holders, tuple(claimed), tuple(reading), counts, digests)

    def _sample(self, state: _Swarm, chunk: int, me: Peer) -> tuple[Peer, ...]:
        """A few holders at random, `NEAR` of them of the node's own zone where there are as many."""
        zones = state.holders[chunk]
        near = zones.get(me.zone, ())
        total = state.counts[chunk]
        some: list[str] = []
        if len(near) == total:
            some = self._some(near, MAX_HOLDERS)
        else:
            if near:
                some = self._some(near, NEAR)
            far: Iterable[str] = chain.from_iterable(zones.values())
            if total <= MAX_HOLDERS:
                some = list(far)
            else:
                for _ in range(MAX_HOLDERS * 2):
                    if len(some) == MAX_HOLDERS:
                        break
                    one = self._any(zones, total)
                    if one not in some:
                        some.append(one)
        return tuple([state.members[node].peer for node in some if node != me.id])

    def _some(self, nodes: Sequence[str], most: int) -> list[str]:
        total = len(nodes)
        if total <= most:
            return list(nodes)
        some: list[str] = []
        for _ in range(most * 2):
            one = nodes[int(self._random() * total)]
            if one not in some:
                some.append(one)
                if len(some) == most:
                    break
        return some

    def _any(self, zones: dict[str, list[str]], total: int) -> str:
        at = int(self._random() * total)
        for nodes in zones.values():
            if at < len(nodes):
                return nodes[at]
            at -= len(nodes)
        raise AssertionError("the count of a chunk is that of its holders")

    # State of one swarm

    def _live(self, swarm: Swarm, now: float) -> _Swarm | None:
        state = self._swarms.get(swarm)
        return state if state is not None and state.until > now else None

    def _open(self, swarm: Swarm, now: float) -> _Swarm:
        state = self._live(swarm, now)
        if state is None:
            state = _Swarm([{} for _ in range(swarm.chunks)], [0] * swarm.chunks, 0.0)
            self._swarms[swarm] = state
        state.until = now + self.lifetime
        return state

    def _join(self, state: _Swarm, me: Peer, chunks: int, now: float) -> _Member:
        member = state.members.get(me.id)
        if member is None:
            if not self._lives(me.id, now):
                self._admit(me, now + self.lease, told=False)
            member = state.members[me.id] = _Member(me, bytearray(chunks))
        return member

    def _drop(self, state: _Swarm, node: str) -> None:
        member = state.members.get(node)
        if member is None:
            return
        for chunk in range(len(member.have)):
            if member.have[chunk]:
                self._lose(state, node, chunk)
        del state.members[node]
        for chunk in [chunk for chunk, (owner, _) in state.claims.items() if owner == node]:
            del state.claims[chunk]

    def _gain(self, state: _Swarm, me: Peer, member: _Member, chunk: int) -> None:
        if not member.have[chunk]:
            member.have[chunk] = 1
            state.counts[chunk] += 1
            state.holders[chunk].setdefault(member.peer.zone, []).append(me.id)

    def _lose(self, state: _Swarm, node: str, chunk: int) -> None:
        self._clear(state, node, chunk)
        self._unlearn(state, chunk)

    def _clear(self, state: _Swarm, node: str, chunk: int) -> None:
        member = state.members.get(node)
        if member is not None and member.have[chunk]:
            member.have[chunk] = 0
            state.counts[chunk] -= 1
            state.holders[chunk][member.peer.zone].remove(node)

    def _unlearn(self, state: _Swarm, chunk: int) -> None:
        if not state.counts[chunk]:
            state.digests.pop(chunk, None)

    def _claimant(self, state: _Swarm, chunk: int, now: float) -> str | None:
        owner, until = state.claims.get(chunk, ("", 0.0))
        return owner if until > now else None

    # Values

    def add_kin(self, key: str, snapshot_id: str) -> None:
        rest = [other for other in self._kin.get(key, []) if other != snapshot_id]
        self._kin[key] = [snapshot_id, *rest][:MAX_KIN]

    def kin(self, key: str) -> list[str]:
        return list(self._kin.get(key, []))

    def remember(self, key: str, value: bytes, seconds: float, now: float) -> None:
        self._values[key] = (value, now, now + seconds)

    def recall(self, key: str, now: float) -> tuple[bytes, float] | None:
        """The value, and how many seconds ago it was remembered."""
        value, since, until = self._values.get(key, (b"", 0.0, 0.0))
        return (value, now - since) if until > now else None

    def lock(self, key: str, token: str, seconds: float, now: float) -> bool:
        """Take or keep the right to find out a value."""
        holder, until = self._locks.get(key, ("", 0.0))
        if holder != token and until > now:
            return False
        self._locks[key] = (token, now + seconds)
        return True

    def unlock(self, key: str, token: str) -> None:
        if self._locks.get(key, ("", 0.0))[0] == token:
            del self._locks[key]


class MemoryTracker:
    """One node's way to `MemorySwarms`: a `Tracker`."""

    def __init__(self, swarms: MemorySwarms, me: Peer, clock: Callable[[], float]) -> None:
        self._swarms = swarms
        self._me = me
        self._clock = clock

    async def register(self, peer: Peer, seconds: float) -> bool:
        self._me = peer
        return self._swarms.register(peer, seconds, self._clock())

    async def unregister(self) -> None:
        self._swarms.unregister(self._me.id)

    async def members(self) -> list[Peer]:
        return self._swarms.members(self._clock())

    async def announce(self, swarm: Swarm, have: bytes) -> None:
        self._swarms.announce(self._me, swarm, have, self._clock())

    async def leave(self, swarm: Swarm) -> None:
        self._swarms.leave(self._me, swarm, self._clock())

    async def exchange(self, swarm: Swarm, request: Exchange) -> Answer:
        return self._swarms.exchange(self._me, swarm, request, self._clock())

    async def look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        return self._swarms.look(self._me, swarm, chunks, self._clock())

    async def add_kin(self, key: str, snapshot_id: str) -> None:
        self._swarms.add_kin(key, snapshot_id)

    async def kin(self, key: str) -> list[str]:
        return self._swarms.kin(key)

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        return await once(self, key, max_age, ask, lease=self._swarms.lease)

    async def remember(self, key: str, value: bytes, seconds: float) -> None:
        self._swarms.remember(key, value, seconds, self._clock())

    async def recall(self, key: str) -> bytes | None:
        found = self._swarms.recall(key, self._clock())
        return None if found is None else found[0]

    async def recall_aged(self, key: str) -> tuple[bytes, float] | None:
        return self._swarms.recall(key, self._clock())

    async def lock(self, key: str, token: str, seconds: float) -> bool:
        return self._swarms.lock(key, token, seconds, self._clock())

    async def unlock(self, key: str, token: str) -> None:
        self._swarms.unlock(key, token)

    async def close(self) -> None:
        pass
