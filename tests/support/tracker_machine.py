"""Nodes that say anything in any order, to a real server and to the model in memory at once."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.trackers import Beside, bitmap

from headrace.cache.tracker.memory import MemorySwarms
from headrace.cache.tracker.protocol import MAX_HOLDERS, Answer, Exchange, Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings

SWARMS = (Swarm("one", 21), Swarm("one", 9), Swarm("two", 40))
PEERS = tuple(Peer(f"n{i}", f"host{i}:1", zone) for i, zone in enumerate(("", "", "a", "a", "b")))
_serial = itertools.count()

swarms = st.sampled_from(SWARMS)
peers = st.sampled_from(PEERS)
chunks = st.lists(st.integers(0, 8), max_size=5, unique=True)


class TrackerMachine(RuleBasedStateMachine):
    """Compares the answers. `url`: the server's; each run has a prefix of its own there."""

    url = ""

    @initialize(settled=st.sampled_from([0.0, 1e6]))
    def begin(self, settled: float) -> None:
        self.settings = TrackerSettings(self.url, prefix=f"model{next(_serial)}", lease=1000, timeout=200)
        self.runner = asyncio.Runner()
        self.settled = settled
        self.beside = Beside(self.settings)
        self.trackers = {
            peer.id: RedisTracker(self.settings, peer, (b"secret",), settled=settled, seed=1)
            for peer in PEERS
        }
        self.restart()

    def restart(self) -> None:
        self.model = MemorySwarms(lease=1000, lifetime=1e9, settled=self.settled)
        self.dead: set[Peer] = set()  # nobody has cleared up after them yet

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    # What nodes say

    @rule(peer=peers)
    def register(self, peer: Peer) -> None:
        new = self.run(self.trackers[peer.id].register(peer, 1000.0))
        assert new == self.model.register(peer, 1000.0, 0.0)
        self.dead.clear()

    @rule(peer=peers)
    def unregister(self, peer: Peer) -> None:
        self.run(self.trackers[peer.id].unregister())
        self.model.unregister(peer.id)
        self.dead.discard(peer)

    @rule(
        peer=peers,
        swarm=swarms,
        gained=chunks,
        lost=chunks,
        wanted=chunks,
        claims=st.integers(0, 4),
        keep=chunks,
        give_back=chunks,
        missing=st.lists(
            st.tuples(st.integers(0, 8), st.sampled_from([*(p.id for p in PEERS), "?"])), max_size=3
        ),
        learn=st.booleans(),
    )
    def exchange(
        self,
        peer: Peer,
        swarm: Swarm,
        gained: list[int],
        lost: list[int],
        wanted: list[int],
        claims: int,
        keep: list[int],
        give_back: list[int],
        missing: list[tuple[int, str]],
        learn: bool,
    ) -> None:
        wanted = [c for c in wanted if c not in gained and peer.id not in self.model.holders(swarm, c)]
        digests = {chunk: b"%d of %s" % (chunk, peer.id.encode()) for chunk in gained} if learn else {}
        request = Exchange(gained, lost, digests, wanted, claims, keep, give_back, missing)
        answer = self.run(self.trackers[peer.id].exchange(swarm, request))
        expected = self.model.exchange(peer, swarm, request, 0.0)
        self.compare(swarm, peer, answer, expected)

    @rule(peer=peers, swarm=swarms, have=st.sets(st.integers(0, 8)))
    def announce(self, peer: Peer, swarm: Swarm, have: set[int]) -> None:
        self.run(self.trackers[peer.id].announce(swarm, bitmap(swarm, have)))
        self.model.announce(peer, swarm, bitmap(swarm, have), 0.0)

    @rule(peer=peers, swarm=swarms)
    def leave(self, peer: Peer, swarm: Swarm) -> None:
        self.run(self.trackers[peer.id].leave(swarm))
        self.model.leave(peer, swarm, 0.0)

    @rule(peer=peers, swarm=swarms, some=chunks)
    def look(self, peer: Peer, swarm: Swarm, some: list[int]) -> None:
        answer = self.run(self.trackers[peer.id].look(swarm, some))
        self.compare(swarm, peer, answer, self.model.look(peer, swarm, some, 0.0))

    @rule(key=st.sampled_from("ab"), snapshot=st.sampled_from("0123456789"))
    def add_kin(self, key: str, snapshot: str) -> None:
        self.run(self.trackers["n0"].add_kin(key, snapshot))
        self.model.add_kin(key, snapshot)
        assert self.run(self.trackers["n1"].kin(key)) == self.model.kin(key)

    # What happens to them

    @rule(peer=peers)
    def dies(self, peer: Peer) -> None:
        """Its time is over; the next that registers clears up."""
        keys = self.trackers[peer.id]._keys
        if self.beside.client.delete(keys.node(peer.id)):
            self.beside.client.zadd(keys.deadlines, {peer.id: 1})
            self.model._nodes[peer.id].until = self.model._due = 0.0
            self.dead.add(peer)

    @rule()
    def scripts_are_forgotten(self) -> None:
        self.beside.client.script_flush()

    @rule()
    def everything_is_forgotten(self) -> None:
        if keys := self.beside.names():
            self.beside.client.delete(*keys)
        self.restart()

    # What holds

    def compare(self, swarm: Swarm, me: Peer, answer: Answer, expected: Answer) -> None:
        assert set(answer.claimed) == set(expected.claimed)
        assert set(answer.reading) == set(expected.reading)
        assert answer.counts == expected.counts
        assert answer.digests == expected.digests
        assert set(answer.holders) == {c for c, some in expected.holders.items() if some}
        for chunk, some in answer.holders.items():
            everybody = self.model.holders(swarm, chunk) - {me.id}
            assert len({peer.id for peer in some}) == len(some) == min(MAX_HOLDERS, len(everybody))
            assert {peer.id for peer in some} <= everybody
            assert set(some) <= set(PEERS)

    @invariant()
    def members_are_the_same(self) -> None:
        if hasattr(self, "model"):
            members = self.run(self.trackers["n0"].members())
            assert members == sorted(members, key=lambda peer: peer.id)
            living = self.model.members(0.0)
            assert set(living) <= set(members) <= {*living, *self.dead}

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        keys = self.beside.names()
        endless = [key for key in keys if self.beside.client.pttl(key) == -1]
        for tracker in self.trackers.values():
            self.run(tracker.close())
        if keys:
            self.beside.client.delete(*keys)
        self.beside.close()
        self.runner.close()
        assert endless == []
