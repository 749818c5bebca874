"""Which chunk a staging run fetches next, and from where.

One `Scheduler` for one run of one stager. It is told what happens and says what to do; it does no I/O and has
no clock: whoever drives it calls `ask` and `start` after each event, and again at `wake`. Nothing is ever
looked for in the whole plan: a step costs what the chunks that it moves cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from random import Random

from headrace.cache.growth import ConnectionGrowth
from headrace.cache.policy.board import Board, Stand
from headrace.cache.policy.choice import Choice
from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.flights import Flight, Flights
from headrace.cache.policy.limits import Limits
from headrace.cache.policy.news import News
from headrace.cache.policy.pace import Pace
from headrace.cache.policy.waits import Waits
from headrace.cache.policy.window import Window
from headrace.cache.tracker.protocol import Answer, Exchange, Peer

_ASKED, _KNOWN, _FLYING, _HERE = map(int, (Stand.ASKED, Stand.KNOWN, Stand.FLYING, Stand.HERE))
_FIRST_OF_ALL = -1
_LAST_OF_ALL = 1 << 32
_DEFAULT = Limits()


class Scheduler:
    """The decisions of one staging run."""

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        order: Sequence[int] | None = None,
        me: Peer,
        seed: int,
        limits: Limits = _DEFAULT,
    ) -> None:
        """
        Args:
            sizes: bytes of each chunk of the swarm.
            order: the plan: chunks to fetch, in this order; all of them by default.
            me: this node.
            seed: another one on each node, so that nodes ask for different chunks first.
        """
        order = range(len(sizes)) if order is None else order
        random = Random(seed)
        self._sizes = sizes
        self._limits = limits
        self._demand = limits.demand
        self._random = random.random
        self._window = Window(sizes, order, limits.window, limits.least_window)
        self._board = Board(len(sizes), random.random)
        self._choice = Choice(me, limits, random)
        self._flights = Flights(limits)
        self._waits = Waits(limits)
        self._pace = Pace(limits, random.random)
        self._news = News()
        self._growth = ConnectionGrowth(target=limits.first_claims, limit=limits.claims)
        self._left = len(order)
        self._urgent: set[int] = set()
        self._claims: deque[int] = deque()
        self._counts: dict[int, int] = {}
        self._tries: dict[int, int] = {}
        # Late transfers whose chunk has no other known holder.
        self._second: dict[int, Flight] = {}
        self._unclaimed = False
        self._asking: Exchange | None = None
        self._silent_until = -inf
        self._retry = limits.retry
        self._keep_at = inf
        self._origin_since = 0.0
        self._origin_bytes = 0
        self._origin_ended = 0
        self._origin_failures = 0
        self._origin_until = -inf
        self._advance()

    @property
    def done(self) -> bool:
        """Whether nothing is absent any more and everything gained was announced."""
        return not self._left and self._asking is None and not len(self._news)

    @property
    def complete(self) -> bool:
        """Whether nothing is absent any more."""
        return not self._left

    @property
    def left_alone(self) -> int:
        """How often a peer was left alone for a while."""
        return self._choice.left_alone

    # What happened on this node.

    def present(self, chunks: Iterable[int], now: float) -> None:
        """Chunks are here, verified, however they came."""
        for chunk in chunks:
            self._arrive(chunk, now, now)

    def absent(self, chunks: Iterable[int], now: float) -> None:
        """Chunks are not here (any more), or the other stager that had taken them gave them up."""
        board, state = self._board, self._board.state
        for chunk in chunks:
            if state[chunk] == _HERE:
                self._news.lost(chunk, now)
                if self._awaited(chunk):
                    self._left += 1
                self._window.back(chunk)
            elif state[chunk] != Stand.TAKEN:
                continue
            board.move(chunk, Stand.CLOSED)
            self._offer(chunk)
        self._advance()

    def taken(self, chunks: Iterable[int], now: float) -> None:
        """Another stager of this node fetches these chunks: freed by `present` or `absent`."""
        for chunk in chunks:
            if self._board.state[chunk] != _HERE:
                self._board.move(chunk, Stand.TAKEN)

    def want(self, chunks: Iterable[int]) -> None:
        """Readers wait for these: they come first, wherever the window is."""
        state = self._board.state
        for chunk in chunks:
            if chunk in self._urgent or state[chunk] == _HERE:
                continue
            if not self._awaited(chunk):
                self._left += 1
            self._urgent.add(chunk)
            if state[chunk] == _KNOWN:
                self._board.hasten(chunk, _FIRST_OF_ALL)
            elif state[chunk] in (Stand.CLOSED, Stand.POOL, Stand.LATER):
                self._offer(chunk)
                self._pace.hasten(-inf)

    def set_demand(self, demand: bool) -> None:
        """Somebody waits for this run from now on, or nobody any more: see `Limits.demand`, for how it begins."""
        self._demand = demand

    # The tracker.

    def ask(self, now: float) -> Exchange | None:
        """What to say to the tracker now; None: nothing yet. One exchange is under way at a time."""
        if self._asking is not None or now < self._silent_until:
            return None
        board, news, limits = self._board, self._news, self._limits
        if now >= board.rest_at:
            self._return(now)
        keeping = now >= self._keep_at
        speak = keeping or now >= news.due or news.gains >= limits.batch
        wanted: list[int] = []
        claims = 0
        if now >= self._pace.ask_at and (board.pooled or self._second):
            ahead = self._pace.ahead()
            claims = self._free_claims(now)
            if speak or board.stocked <= ahead >> 2 or (claims and self._unclaimed) or self._second:
                wanted = self._choose(max(ahead - board.stocked, claims))
                self._pace.asked(now)
        if not wanted and not speak:
            return None
        keep: tuple[int, ...] = ()
        if keeping:
            keep = (*self._flights.origin, *self._claims)
            self._keep_at = now + limits.keep if keep else inf
        gained, lost, give_back, missing = news.take()
        if not (wanted or gained or lost or give_back or missing or keep):
            return None
        self._asking = Exchange(gained, lost, {}, wanted, claims if wanted else 0, keep, give_back, missing)
        return self._asking

    def answered(self, request: Exchange, answer: Answer, now: float) -> None:
        """Take in the tracker's answer."""
        self._asking = None
        self._retry = self._limits.retry
        board, state, flights = self._board, self._board.state, self._flights
        found = 0
        for chunk in answer.claimed:
            if state[chunk] == _ASKED:
                board.move(chunk, Stand.CLAIMED)
                self._claims.append(chunk)
                self._waits.over(chunk, now)
                found += 1
            elif chunk not in flights.origin and state[chunk] != Stand.TAKEN:
                self._news.give_back(chunk, now)
        if self._claims and self._keep_at == inf:
            self._keep_at = now + self._limits.keep
        counts = answer.counts
        self._pace.heard(counts.values())
        for chunk, holders in answer.holders.items():
            if state[chunk] == _ASKED:
                self._counts[chunk] = counts.get(chunk, len(holders))
                board.know(chunk, self._rank(chunk), holders)
                self._waits.over(chunk, now)
                found += 1
            elif chunk in self._second:
                flight = self._second[chunk]
                flight.holders = (*flight.holders, *holders)
        self._second.clear()
        if request.wanted:
            self._pace.answered(len(request.wanted), found, now)
        if found < len(request.wanted):
            self._put_rest(request, answer, now)

    def unanswered(self, request: Exchange, now: float) -> None:
        """The tracker could not be reached: nothing is concluded, and it is asked again after a pause."""
        self._asking = None
        self._second.clear()
        state = self._board.state
        for chunk in request.wanted:
            if state[chunk] == _ASKED:
                self._offer(chunk)
        here = [chunk for chunk in (*request.gained, *request.lost) if state[chunk] == _HERE]
        self._news.unheard(request, here, now)
        if request.keep:
            self._keep_at = now
        self._silent_until = now + self._retry * (0.75 + self._random() / 2)
        self._retry = min(self._retry * 2, self._limits.most_retry)

    # Transfers.

    def start(self, now: float) -> list[Fetch]:
        """Transfers to begin now, second tries included."""
        fetches: list[Fetch] = []
        board, flights, limits = self._board, self._flights, self._limits
        if now >= board.rest_at:
            self._return(now)
        while self._claims:
            chunk = self._claims.popleft()
            if board.state[chunk] == Stand.CLAIMED:
                board.state[chunk] = _FLYING
                fetches.append(flights.begin(chunk, self._sizes[chunk], None, (), now).fetch)
            elif board.state[chunk] == _HERE:
                self._news.give_back(chunk, now)
        full: list[tuple[int, Sequence[Peer]]] = []
        while flights.peers < limits.downloads and len(full) < limits.downloads:
            known = board.next_known()
            if known is None:
                break
            chunk, holders = known
            source = self._choice.pick(chunk, holders, now)
            if source is None:
                if self._choice.free_at(chunk, holders, now) <= now:
                    # Enough transfers from its holders are under way: its turn comes when one of them ends.
                    full.append(known)
                    continue
                if self._choice.useless(chunk, holders, now):
                    # What nobody can be asked for must not be kept from being read from the origin.
                    for peer in holders:
                        self._news.missing(chunk, peer.id, now)
                self._put_off(chunk, holders, now)
                continue
            board.state[chunk] = _FLYING
            fetches.append(flights.begin(chunk, self._sizes[chunk], source, holders, now).fetch)
        for chunk, holders in full:
            board.know(chunk, self._rank(chunk), holders)
        if flights.late_at <= now and self._demand:
            fetches.extend(self._hedges(now))
        return fetches

    def finished(self, fetch: Fetch, outcome: Outcome, now: float, queue: int = 0) -> list[Fetch]:
        """A transfer has ended: `DONE` says that its chunk is here, too.

        Args:
            queue: how many transfers the peer was serving, as it said.

        Returns:
            transfers to cancel: the losers of second tries.
        """
        flight = self._flights.end(fetch.number)
        if flight is None:
            return []
        chunk, source, twin = fetch.chunk, flight.source, flight.twin
        if source is None:
            self._origin_end(flight, outcome, now)
        elif self._choice.ended(source, chunk, outcome, now, queue):
            self._news.missing(chunk, source.peer.id, now)
        state = self._board.state
        if outcome is Outcome.DONE:
            if source is not None:
                self._flights.took(flight, now)
            self._arrive(chunk, now, now + self._pace.patience(source is None))
            return [] if twin is None else [twin.fetch]
        flight.twin = None
        if state[chunk] != _FLYING or (twin is not None and not twin.over):
            return []
        if source is None:
            # The pause for the origin holds for all of it; the chunk itself may come from a peer.
            self._news.give_back(chunk, now)
            self._offer(chunk)
        elif outcome is Outcome.CANCELLED:
            self._offer(chunk)
        else:
            rest = [peer for peer in flight.holders if peer.id != source.peer.id]
            if rest and self._choice.free_at(chunk, rest, now) <= now:
                self._board.know(chunk, self._rank(chunk), rest)
            else:
                self._put_off(chunk, flight.holders, now)
        return []

    def wake(self, now: float) -> float:
        """When to call `ask` and `start` again if nothing happens before; infinite: not before something does."""
        at = self._flights.late_at if self._demand else inf
        if self._asking is None:
            board = self._board
            speak = min(self._news.due, self._keep_at)
            hungry = board.stocked <= self._pace.ahead() >> 2
            if hungry or (self._unclaimed and self._free_claims(inf)):
                look = self._pace.ask_at
                if not board.pooled:
                    look = max(look, board.rest_at)
                elif not hungry:
                    look = max(look, self._origin_until)
                speak = min(speak, look)
            at = min(at, max(speak, self._silent_until))
        if self._flights.peers < self._limits.downloads and self._board.rest_at < at:
            at = self._board.rest_at
        return at if at > now else now

    # Within.

    def _awaited(self, chunk: int) -> bool:
        return chunk in self._urgent or self._window.place(chunk) >= 0

    def _rank(self, chunk: int) -> int:
        """The rarest first. But where very many nodes want what few have, some of them leave it for last."""
        if chunk in self._urgent:
            return _FIRST_OF_ALL
        count = self._counts.get(chunk, 1)
        if count * self._limits.rush < self._pace.crowd * self._random():
            return _LAST_OF_ALL + count
        return count

    def _arrive(self, chunk: int, now: float, due: float) -> None:
        state = self._board.state
        if state[chunk] == _HERE:
            return
        if self._awaited(chunk):
            self._left -= 1
        self._board.move(chunk, Stand.HERE)
        self._urgent.discard(chunk)
        self._counts.pop(chunk, None)
        self._tries.pop(chunk, None)
        self._waits.forget(chunk)
        if self._window.passed(chunk):
            self._advance()
        self._pace.arrived()
        self._news.gained(chunk, due if self._left else now)

    def _advance(self) -> None:
        for chunk in self._window.advance():
            if self._board.state[chunk] == Stand.CLOSED:
                self._offer(chunk)

    def _offer(self, chunk: int) -> None:
        """To be asked about, if it is open: early ones first, but mixed by this node's own chance."""
        window = self._window
        if chunk in self._urgent:
            key = -1.0
        elif window.open(chunk):
            key = window.place(chunk) + self._random() * (window.end - window.first)
        else:
            self._board.move(chunk, Stand.CLOSED)
            return
        self._board.offer(chunk, key)

    def _put_off(self, chunk: int, holders: Sequence[Peer], now: float) -> None:
        """All holders that are known are busy or left alone: try them once more, then ask for others, ever later."""
        tries = self._tries.get(chunk, 0)
        self._tries[chunk] = tries + 1
        limits = self._limits
        until = now + min(limits.busy * 2.0 ** min(tries, 16), limits.most_poll) * (0.5 + self._random())
        again = tries == 0 and self._choice.free_at(chunk, holders, now) <= until
        self._board.put_off(chunk, until, holders if again else ())

    def _return(self, now: float) -> None:
        """Pauses are over."""
        for chunk, holders in self._board.rested(now):
            if holders:
                self._board.know(chunk, self._rank(chunk), holders)
            else:
                self._offer(chunk)

    def _free_claims(self, now: float) -> int:
        if now < self._origin_until:
            return 0
        return max(0, self._growth.target - len(self._flights.origin) - len(self._claims))

    def _choose(self, most: int) -> list[int]:
        batch, state = self._limits.batch, self._board.state
        # Not what came by another way meanwhile: who wants a chunk says that it does not hold it.
        late = (chunk for chunk, flight in self._second.items() if not flight.over)
        second = [chunk for chunk in late if state[chunk] == _FLYING][:batch]
        return second + self._board.choose(min(most, batch - len(second)))

    def _put_rest(self, request: Exchange, answer: Answer, now: float) -> None:
        """Chunks without a source: others read some of them, and nobody the rest."""
        state = self._board.state
        reading = set(answer.reading)
        self._unclaimed = False
        until = now + self._pace.pause()
        for chunk in request.wanted:
            if state[chunk] != _ASKED:
                continue
            if chunk not in reading:
                self._unclaimed = True
                self._offer(chunk)
                continue
            self._board.put_off(chunk, until)
            if self._waits.reading(chunk, now):
                self._window.passed(chunk)
        self._advance()

    def _origin_end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        if outcome is Outcome.CANCELLED:
            return
        if outcome is not Outcome.DONE:
            limits = self._limits
            pause = min(limits.failed * 2.0 ** min(self._origin_failures, 16), limits.most_failed)
            self._origin_failures += 1
            self._origin_until = now + pause * (0.75 + self._random() / 2)
            return
        self._origin_failures = 0
        self._origin_ended += 1
        self._origin_bytes += flight.size
        if self._origin_ended == 1:
            self._origin_since = flight.began
        if self._unclaimed:
            self._pace.hasten(now)
        if self._origin_ended >= 2 * self._growth.target:
            if now > self._origin_since:
                self._growth.observe(self._origin_bytes / (now - self._origin_since))
            self._origin_ended = self._origin_bytes = 0

    def _hedges(self, now: float) -> list[Fetch]:
        fetches = []
        for late in self._flights.late(now):
            chunk = late.fetch.chunk
            assert late.source is not None
            other = self._choice.pick(chunk, late.holders, now, beside=late.source.peer.id)
            if self._board.state[chunk] != _FLYING:
                continue
            if other is None:
                # Nobody else is known to have it: ask once more, and let the window go on without it.
                self._second[chunk] = late
                self._flights.put_off(late, now + self._limits.hedge / 2)
                self._window.passed(chunk)
                continue
            begun = self._flights.begin(chunk, late.size, other, late.holders, now, beside=late)
            fetches.append(begun.fetch)
        self._advance()
        return fetches
