"""Whatever is answered and however transfers end, in whatever order: what never happens, and that it ends."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from random import Random
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.scheduled import FAR, ME, NEAR, finish

from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.policy.scheduler import Scheduler
from headrace.cache.tracker.protocol import MAX_WANTED, Answer, Exchange, Peer

PEERS = {peer.id: peer for peer in (*NEAR[:2], *FAR[:2])}
CHUNKS = 16
T = TypeVar("T")
GROUPS = [
    ("near-0",),
    ("near-1",),
    ("far-0",),
    ("near-0", "near-1"),
    ("near-1", "far-1"),
    tuple(sorted(PEERS)),
]
BAD = [Outcome.BUSY, Outcome.MISSING, Outcome.CORRUPT, Outcome.FAILED, Outcome.CANCELLED]


class Choose(Protocol):
    """One of several, by chance."""

    def __call__(self, options: Sequence[T], /) -> T: ...


class Driven:
    """One node's scheduler beside what it may know; `Choose` decides what happens."""

    def __init__(self, choose: Choose) -> None:
        plans = [None, None, list(range(CHUNKS - 1, -1, -1)), [3, 1, 4, 15, 9, 2, 6], [7], []]
        plan: list[int] | None = choose(plans)
        self.limits = Limits(
            window=choose([0.05, 0.2, 1.0]),
            least_window=choose([1, 3, 6]),
            downloads=choose([1, 2, 6]),
            per_peer=choose([1, 2, 3]),
            claims=choose([1, 4]),
            demand=choose([False, True]),
            # Without second tries nothing but its start moves the window, and that is compared.
            held_up=inf,
        )
        self.sizes = [1000 + 10 * chunk for chunk in range(CHUNKS)]
        self.plan = list(range(CHUNKS)) if plan is None else plan
        self.one = Scheduler(sizes=self.sizes, order=plan, me=ME, seed=choose(range(100)), limits=self.limits)
        self.now = 0.0
        self.demand = self.demanded = self.limits.demand
        self.asking: Exchange | None = None
        self.flying: dict[int, Fetch] = {}
        self.here: set[int] = set()
        self.told: set[int] = set()
        self.wanted: set[int] = set()
        self.taken: set[int] = set()
        self.claimed: set[int] = set()
        self.named: dict[int, set[str]] = {}
        self.banned: dict[str, float] = {}
        self.denied: set[tuple[int, str]] = set()
        self.edge = 0
        self.look()

    def look(self) -> None:
        """How far the window reaches, or ever did."""
        first = next((at for at, chunk in enumerate(self.plan) if chunk not in self.here), len(self.plan))
        room = self.limits.window * sum(self.sizes[chunk] for chunk in self.plan)
        end = first
        while end < len(self.plan):
            room -= self.sizes[self.plan[end]]
            if room < -1e-6 and end >= first + self.limits.least_window:
                break
            end += 1
        self.edge = max(self.edge, end)

    def act(self, choose: Choose) -> None:
        """One thing happens, and the driver of the policy does what is to be done then."""
        choose(
            [
                self.wait,
                self.wait_as_told,
                self.ask,
                self.converse,
                self.converse,
                self.answer,
                self.lose_the_tracker,
                self.end,
                self.end,
                self.end,
                self.come_by_another_way,
                self.take_back,
                self.take,
                self.free,
                self.want,
                self.change_class,
            ]
        )(choose)
        self.start()
        self.check()

    def change_class(self, choose: Choose) -> None:
        """Somebody comes to wait, or nobody does any more."""
        self.demand = choose([False, True])
        self.demanded = self.demanded or self.demand
        self.one.set_demand(self.demand)

    def wait(self, choose: Choose) -> None:
        self.now += choose([0.0, 0.001, 0.05, 0.5, 3.0, 100.0])

    def wait_as_told(self, choose: Choose) -> None:
        at = self.one.wake(self.now)
        assert at >= self.now
        if at < inf:
            self.now = at

    def ask(self, choose: Choose) -> None:
        request = self.one.ask(self.now)
        if request is None:
            return
        assert self.asking is None
        assert len(request.wanted) <= MAX_WANTED
        assert len(set(request.wanted)) == len(request.wanted)
        assert not set(request.wanted) & (self.here | self.taken)
        open_now = set(self.plan[: self.edge]) | self.wanted
        if not self.demanded:
            assert set(request.wanted) <= open_now
        assert set(request.gained) <= self.here
        assert not set(request.lost) & self.here
        assert request.claims <= self.limits.claims
        assert all(fetch.chunk in request.keep for fetch in self.flying.values() if fetch.peer is None) or (
            not request.keep
        )
        self.asking = request

    def converse(self, choose: Choose) -> None:
        """What happens most: a question and its answer, when it is time."""
        if self.asking is None:
            self.wait_as_told(choose)
            self.ask(choose)
        if self.asking is not None:
            self.answer(choose)

    def answer(self, choose: Choose) -> None:
        request = self.asking
        if request is None:
            return
        holders: dict[int, tuple[Peer, ...]] = {}
        claimed: list[int] = []
        reading: list[int] = []
        for chunk in request.wanted:
            kind = choose(["held", "held", "held", "claimed", "reading", "nothing"])
            if kind == "held":
                names = choose(GROUPS)
                # Another object each time, as over a network.
                holders[chunk] = tuple(Peer(name, PEERS[name].address, PEERS[name].zone) for name in names)
                self.named.setdefault(chunk, set()).update(names)
            elif kind == "claimed" and len(claimed) < request.claims:
                claimed.append(chunk)
            elif kind == "reading":
                reading.append(chunk)
        counts = {chunk: len(holders.get(chunk, ())) for chunk in request.wanted}
        self.claimed.update(claimed)
        self.told.update(request.gained)
        self.told.difference_update(request.lost)
        self.asking = None
        self.one.answered(request, Answer(holders, tuple(claimed), tuple(reading), counts), self.now)

    def lose_the_tracker(self, choose: Choose) -> None:
        if self.asking is None:
            return
        self.one.unanswered(self.asking, self.now)
        self.told.difference_update(self.asking.gained)
        self.asking = None

    def start(self) -> None:
        for fetch in self.one.start(self.now):
            chunk = fetch.chunk
            assert chunk not in self.here
            assert fetch.number not in self.flying
            twins = [other for other in self.flying.values() if other.chunk == chunk]
            if fetch.hedges is None:
                assert not twins
            else:
                assert [twin.number for twin in twins] == [fetch.hedges]
                assert fetch.peer is not None
                assert twins[0].peer is not None
                assert fetch.peer.id != twins[0].peer.id
                assert self.demand
            if fetch.peer is None:
                assert chunk in self.claimed
                self.claimed.remove(chunk)
            else:
                assert fetch.peer.id in self.named[chunk]
                assert (chunk, fetch.peer.id) not in self.denied
                assert self.banned.get(fetch.peer.id, -1.0) <= self.now
            if not self.demanded and fetch.peer is not None:
                assert chunk in self.plan[: self.edge] or chunk in self.wanted
            self.flying[fetch.number] = fetch

    def end(self, choose: Choose) -> None:
        if not self.flying:
            return
        outcome = choose([Outcome.DONE] * 4 + BAD)
        fetch = self.flying.pop(choose(sorted(self.flying)))
        if fetch.peer is not None:
            if outcome in (Outcome.MISSING, Outcome.CORRUPT):
                self.denied.add((fetch.chunk, fetch.peer.id))
            if outcome is Outcome.CORRUPT:
                self.banned[fetch.peer.id] = self.now + self.limits.corrupt
        elif outcome in (Outcome.BUSY, Outcome.MISSING):
            outcome = Outcome.FAILED
        if outcome is Outcome.DONE:
            self.arrive(fetch.chunk)
        losers = self.one.finished(fetch, outcome, self.now, choose(range(8)))
        assert all(loser.chunk == fetch.chunk for loser in losers)
        assert outcome is Outcome.DONE or not losers
        for loser in losers:
            del self.flying[loser.number]
            self.one.finished(loser, Outcome.CANCELLED, self.now)

    def arrive(self, chunk: int) -> None:
        self.here.add(chunk)
        self.taken.discard(chunk)
        self.wanted.discard(chunk)
        self.look()

    def come_by_another_way(self, choose: Choose) -> None:
        chunk = choose(range(CHUNKS))
        self.arrive(chunk)
        self.one.present([chunk], self.now)

    def take_back(self, choose: Choose) -> None:
        if not self.here:
            return
        chunk = choose(sorted(self.here))
        if any(fetch.chunk == chunk for fetch in self.flying.values()):
            return
        self.here.remove(chunk)
        self.told.discard(chunk)
        self.one.absent([chunk], self.now)

    def take(self, choose: Choose) -> None:
        chunk = choose(range(CHUNKS))
        if chunk in self.here or any(fetch.chunk == chunk for fetch in self.flying.values()):
            return
        self.taken.add(chunk)
        self.one.taken([chunk], self.now)

    def free(self, choose: Choose) -> None:
        if not self.taken:
            return
        chunk = choose(sorted(self.taken))
        self.taken.remove(chunk)
        self.one.absent([chunk], self.now)

    def want(self, choose: Choose) -> None:
        chunks = [choose(range(CHUNKS))]
        self.wanted.update(set(chunks) - self.here)
        self.one.want(chunks)

    def check(self) -> None:
        flying = list(self.flying.values())
        second = sum(fetch.hedges is not None for fetch in flying)
        peers = [fetch.peer.id for fetch in flying if fetch.peer is not None]
        assert second <= max(1, self.limits.downloads // 4)
        assert len(peers) <= self.limits.downloads + second
        assert all(peers.count(peer) <= self.limits.per_peer for peer in peers)
        assert sum(fetch.peer is None for fetch in flying) <= self.limits.claims
        assert self.one.complete == (not (set(self.plan) | self.wanted) - self.here)
        assert not self.one.done or self.one.complete
        assert not self.one.done or self.here <= self.told

    def finish(self) -> None:
        """From here on all goes well, and it ends."""
        if self.asking is not None:
            self.one.unanswered(self.asking, self.now)
        self.one.absent(self.taken, self.now)
        finish(self.one, self.now, self.flying.values())


class Run(RuleBasedStateMachine):
    """What happens as hypothesis chooses, for examples that are as short as can be."""

    driven: Driven | None = None

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.driven = Driven(lambda options: data.draw(st.sampled_from(options)))

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        assert self.driven is not None
        self.driven.act(lambda options: data.draw(st.sampled_from(options)))

    def teardown(self) -> None:
        if self.driven is not None:
            self.driven.finish()


TestRun: Any = Run.TestCase
TestRun.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(60))
def test_long_runs(seed: int) -> None:
    """What happens by chance, for much longer."""
    choose = Random(seed).choice
    driven = Driven(choose)
    for _ in range(400):
        driven.act(choose)
    driven.finish()
