"""Transfers under way, how long they usually take, and which of them deserve a second try."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from math import inf
from statistics import median

from headrace.cache.policy.choice import Known
from headrace.cache.policy.fetch import Fetch
from headrace.cache.policy.limits import Limits
from headrace.cache.tracker.protocol import Peer

_SAMPLES = 32
_FIRST = 4  # samples before a usual time is known


class Flight:
    """One transfer.

    Attributes:
        source: the peer; None: the origin.
        holders: of the chunk, as far as known.
        late: when it takes too long.
        twin: the other transfer of the same chunk, if there are two.
        over: it has ended.
    """

    __slots__ = ("began", "fetch", "holders", "late", "over", "size", "source", "twin")

    def __init__(
        self,
        fetch: Fetch,
        source: Known | None,
        holders: Sequence[Peer],
        size: int,
        began: float,
        late: float,
    ) -> None:
        self.fetch = fetch
        self.source = source
        self.holders = holders
        self.size = size
        self.began = began
        self.late = late
        self.twin: Flight | None = None
        self.over = False


class Flights:
    """All transfers of one run.

    Attributes:
        peers: how many from peers are under way.
        origin: chunks on their way from the origin.
        hedges: how many of those under way are second tries.
        late_at: nothing takes too long before.
    """

    __slots__ = (
        "_begun",
        "_by_number",
        "_hedged",
        "_limits",
        "_queue",
        "_samples",
        "_taken",
        "_usual",
        "hedges",
        "late_at",
        "origin",
        "peers",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_number: dict[int, Flight] = {}
        self._queue: deque[Flight] = deque()
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._taken = 0
        self._usual: float | None = None
        self._begun = 0
        self._hedged = 0
        self.peers = 0
        self.hedges = 0
        self.late_at = inf
        self.origin: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def begin(
        self,
        chunk: int,
        size: int,
        source: Known | None,
        holders: Sequence[Peer],
        now: float,
        beside: Flight | None = None,
    ) -> Flight:
        """A transfer begins."""
        number = self._begun
        self._begun = number + 1
        limits = self._limits
        if source is None:
            flight = Flight(Fetch(number, chunk, None), None, holders, size, now, inf)
            self.origin[chunk] = None
        else:
            usual = self._usual
            late = limits.hedge_factor * (limits.hedge if usual is None else usual * size)
            hedges = None if beside is None else beside.fetch.number
            fetch = Fetch(number, chunk, source.peer, hedges)
            flight = Flight(fetch, source, holders, size, now, now + max(limits.hedge, late))
            self.peers += 1
            source.flying += 1
            if beside is None:
                self._queue.append(flight)
                if flight.late < self.late_at:
                    self.late_at = flight.late
            else:
                flight.twin, beside.twin = beside, flight
                self.hedges += 1
                self._hedged += 1
        self._by_number[number] = flight
        return flight

    def end(self, number: int) -> Flight | None:
        """A transfer has ended; None where it is not known (any more)."""
        flight = self._by_number.pop(number, None)
        if flight is None:
            return None
        flight.over = True
        if flight.source is None:
            self.origin.pop(flight.fetch.chunk, None)
        else:
            self.peers -= 1
            if flight.fetch.hedges is not None:
                self.hedges -= 1
        if flight.twin is not None:
            flight.twin.twin = None
        return flight

    def took(self, flight: Flight, now: float) -> None:
        """Learn from one that brought its chunk from a peer."""
        self._samples.append((now - flight.began) / flight.size)
        self._taken += 1
        # The usual time is worked out anew now and then, not each time.
        if self._usual is None or self._taken % 8 == 0:
            self._usual = median(self._samples) if len(self._samples) >= _FIRST else None

    def late(self, now: float) -> Iterator[Flight]:
        """Transfers from peers that take too long, while second tries are allowed; each is to be hedged or put off."""
        limits, queue = self._limits, self._queue
        while queue:
            flight = queue[0]
            if flight.over or flight.twin is not None:
                queue.popleft()
                continue
            if flight.late > now:
                self.late_at = flight.late
                return
            if self.hedges >= max(1, limits.downloads // 4) or (
                self._hedged > 1 + limits.hedge_share * self._begun
            ):
                self.late_at = now + limits.hedge / 4
                return
            queue.popleft()
            yield flight
        self.late_at = inf

    def put_off(self, flight: Flight, until: float) -> None:
        """There is nobody for a second try now."""
        flight.late = until
        self._queue.append(flight)
