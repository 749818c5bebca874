"""Whatever is answered and however transfers end, in whatever order: what never happens, and that it ends."""

from __future__ import annotations

from math import inf
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.scheduled import FAR, ME, NEAR, finish

from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.policy.scheduler import Scheduler
from headrace.cache.tracker.protocol import MAX_WANTED, Answer, Exchange, Peer

PEERS = {peer.id: peer for peer in (*NEAR[:2], *FAR[:2])}
CHUNKS = 16
BAD = [Outcome.BUSY, Outcome.MISSING, Outcome.CORRUPT, Outcome.FAILED, Outcome.CANCELLED]


class Run(RuleBasedStateMachine):
    """One node's scheduler beside what it may know."""

    @initialize(
        seed=st.integers(0, 100),
        window=st.sampled_from([0.05, 0.2, 1.0]),
        least=st.integers(1, 6),
        downloads=st.integers(1, 6),
        per_peer=st.integers(1, 3),
        claims=st.integers(1, 4),
        demand=st.booleans(),
        plan=st.lists(st.integers(0, CHUNKS - 1), unique=True, max_size=CHUNKS) | st.none(),
    )
    def begin(
        self,
        seed: int,
        window: float,
        least: int,
        downloads: int,
        per_peer: int,
        claims: int,
        demand: bool,
        plan: list[int] | None,
    ) -> None:
        self.limits = Limits(
            window=window,
            least_window=least,
            downloads=downloads,
            per_peer=per_peer,
            first_claims=1,
            claims=claims,
            demand=demand,
            # Without second tries nothing but its start moves the window, and that is compared.
            held_up=inf,
        )
        self.sizes = [1000 + 10 * chunk for chunk in range(CHUNKS)]
        self.plan = list(range(CHUNKS)) if plan is None else plan
        self.one = Scheduler(sizes=self.sizes, order=plan, me=ME, seed=seed, limits=self.limits)
        self.now = 0.0
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

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.5, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.start()

    @rule()
    def wait_as_told(self) -> None:
        at = self.one.wake(self.now)
        assert at >= self.now
        if at < inf:
            self.now = at
        self.start()

    @rule()
    def ask(self) -> None:
        request = self.one.ask(self.now)
        if request is None:
            return
        assert self.asking is None
        assert len(request.wanted) <= MAX_WANTED
        assert len(set(request.wanted)) == len(request.wanted)
        assert not set(request.wanted) & (self.here | self.taken)
        open_now = set(self.plan[: self.edge]) | self.wanted
        if not self.limits.demand:
            assert set(request.wanted) <= open_now
        assert set(request.gained) <= self.here
        assert not set(request.lost) & self.here
        assert not set(request.gained) & self.told
        assert request.claims <= self.limits.claims
        assert all(fetch.chunk in request.keep for fetch in self.flying.values() if fetch.peer is None) or (
            not request.keep
        )
        self.asking = request

    @rule(data=st.data())
    def converse(self, data: st.DataObject) -> None:
        """What happens most: a question and its answer, when it is time."""
        if self.asking is None:
            self.wait_as_told()
            self.ask()
        if self.asking is not None:
            self.answer(data)

    @precondition(lambda self: self.asking is not None)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        request = self.asking
        assert request is not None
        holders: dict[int, tuple[Peer, ...]] = {}
        claimed: list[int] = []
        reading: list[int] = []
        for chunk in request.wanted:
            kind = data.draw(st.sampled_from(["held", "held", "claimed", "reading", "nothing"]))
            if kind == "held":
                names = data.draw(
                    st.lists(st.sampled_from(sorted(PEERS)), min_size=1, max_size=4, unique=True)
                )
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
        self.start()

    @precondition(lambda self: self.asking is not None)
    @rule()
    def lose_the_tracker(self) -> None:
        assert self.asking is not None
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
                assert self.limits.demand
            if fetch.peer is None:
                assert chunk in self.claimed
                self.claimed.remove(chunk)
            else:
                assert fetch.peer.id in self.named[chunk]
                assert (chunk, fetch.peer.id) not in self.denied
                assert self.banned.get(fetch.peer.id, -1.0) <= self.now
            if not self.limits.demand and fetch.peer is not None:
                assert chunk in self.plan[: self.edge] or chunk in self.wanted
            self.flying[fetch.number] = fetch

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.DONE] * 4 + BAD), queue=st.integers(0, 8))
    def end(self, data: st.DataObject, outcome: Outcome, queue: int) -> None:
        fetch = self.flying.pop(data.draw(st.sampled_from(sorted(self.flying))))
        if fetch.peer is not None:
            if outcome in (Outcome.MISSING, Outcome.CORRUPT):
                self.denied.add((fetch.chunk, fetch.peer.id))
            if outcome is Outcome.CORRUPT:
                self.banned[fetch.peer.id] = self.now + self.limits.corrupt
        elif outcome in (Outcome.BUSY, Outcome.MISSING):
            outcome = Outcome.FAILED
        if outcome is Outcome.DONE:
            self.arrive(fetch.chunk)
        losers = self.one.finished(fetch, outcome, self.now, queue)
        assert all(loser.chunk == fetch.chunk for loser in losers)
        assert outcome is Outcome.DONE or not losers
        for loser in losers:
            del self.flying[loser.number]
            self.one.finished(loser, Outcome.CANCELLED, self.now)
        self.start()

    def arrive(self, chunk: int) -> None:
        self.here.add(chunk)
        self.taken.discard(chunk)
        self.wanted.discard(chunk)
        self.look()

    @rule(chunk=st.integers(0, CHUNKS - 1))
    def come_by_another_way(self, chunk: int) -> None:
        self.arrive(chunk)
        self.one.present([chunk], self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.here)))
        if any(fetch.chunk == chunk for fetch in self.flying.values()):
            return
        self.here.remove(chunk)
        self.told.discard(chunk)
        self.one.absent([chunk], self.now)

    @rule(chunk=st.integers(0, CHUNKS - 1))
    def take(self, chunk: int) -> None:
        if chunk in self.here or any(fetch.chunk == chunk for fetch in self.flying.values()):
            return
        self.taken.add(chunk)
        self.one.taken([chunk], self.now)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(sorted(self.taken)))
        self.taken.remove(chunk)
        self.one.absent([chunk], self.now)

    @rule(chunks=st.lists(st.integers(0, CHUNKS - 1), max_size=3))
    def want(self, chunks: list[int]) -> None:
        self.wanted.update(set(chunks) - self.here)
        self.one.want(chunks)

    @invariant()
    def limits_hold(self) -> None:
        flying = list(self.flying.values()) if hasattr(self, "flying") else []
        second = sum(fetch.hedges is not None for fetch in flying)
        peers = [fetch.peer.id for fetch in flying if fetch.peer is not None]
        if not flying:
            return
        assert second <= max(1, self.limits.downloads // 4)
        assert len(peers) <= self.limits.downloads + second
        assert all(peers.count(peer) <= self.limits.per_peer for peer in peers)
        assert sum(fetch.peer is None for fetch in flying) <= self.limits.claims

    @invariant()
    def complete_means_complete(self) -> None:
        if hasattr(self, "one"):
            assert self.one.complete == (not (set(self.plan) | self.wanted) - self.here)
            assert not self.one.done or self.one.complete
            if self.one.done:
                assert set(self.here) <= self.told

    def teardown(self) -> None:
        if not hasattr(self, "one"):
            return
        if self.asking is not None:
            self.one.unanswered(self.asking, self.now)
        self.one.absent(self.taken, self.now)
        finish(self.one, self.now, self.flying.values())


TestRun: Any = Run.TestCase
TestRun.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
