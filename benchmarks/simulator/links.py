"""Links and the transfers over them, in two models of the same interface.

A transfer passes several links (of its sender, of zones, of its receiver) and is over when each has passed its
bytes. No link ever passes more than its rate, and none idles while it has something to pass. `Shared` gives
each transfer of a link the same share at every moment, as TCP about does, at the price of several events for
each; `Queued` passes one after the other, which needs no event but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Protocol

from headrace.cache.policy.fetch import Fetch


class Link:
    """One direction of one link.

    Attributes:
        cost: seconds for a byte.
    """

    __slots__ = ("clock", "cost", "ends", "free_at", "served", "turn", "waiting")

    def __init__(self, rate: float) -> None:
        self.cost = 1 / rate
        self.free_at = 0.0
        # Of `Shared`: bytes that each transfer was passed since the beginning, when that was worked out, when
        # transfers end on that scale, and which of the events of this link counts.
        self.served = 0.0
        self.clock = 0.0
        self.ends: list[tuple[float, int, Transfer]] = []
        self.waiting = 0
        self.turn = 0


class Transfer:
    """One chunk on its way.

    Attributes:
        to, source: numbers of the nodes; the source is -1 for the origin.
        rest: links that have still to pass it.
        over: it has ended, or was cut.
    """

    __slots__ = ("earliest", "fetch", "links", "over", "rest", "size", "source", "to")

    def __init__(self, fetch: Fetch, size: int, to: int, source: int) -> None:
        self.fetch = fetch
        self.size = size
        self.to = to
        self.source = source
        self.links: Sequence[Link] = ()
        self.rest = 0
        self.earliest = 0.0
        self.over = False


Later = Callable[[float, Transfer], None]


class Network(Protocol):
    """How transfers pass links."""

    def begin(self, transfer: Transfer, links: Sequence[Link], earliest: float, now: float) -> None:
        """A transfer begins; it ends at `earliest` at the earliest."""
        ...

    def cut(self, transfer: Transfer, now: float) -> None:
        """A transfer ends before it is complete."""
        ...


class Queued:
    """First come, first served."""

    def __init__(self, end: Later) -> None:
        self._end = end

    def begin(self, transfer: Transfer, links: Sequence[Link], earliest: float, now: float) -> None:
        size = transfer.size
        for link in links:
            free_at = link.free_at
            free_at = (free_at if free_at > now else now) + size * link.cost
            link.free_at = free_at
            if free_at > earliest:
                earliest = free_at
        self._end(earliest, transfer)

    def cut(self, transfer: Transfer, now: float) -> None:
        transfer.over = True


class Shared:
    """Equal shares at every moment."""

    def __init__(self, end: Later, later: Callable[[float, Link, int], None]) -> None:
        self._end = end
        self._later = later
        self._number = 0

    def begin(self, transfer: Transfer, links: Sequence[Link], earliest: float, now: float) -> None:
        transfer.links = links
        transfer.rest = len(links)
        transfer.earliest = earliest
        if not links:
            self._end(earliest, transfer)
        for link in links:
            self._pass(link, now)
            self._number += 1
            heappush(link.ends, (link.served + transfer.size, self._number, transfer))
            link.waiting += 1
            self._plan(link, now)

    def cut(self, transfer: Transfer, now: float) -> None:
        transfer.over = True
        for link in transfer.links:
            self._pass(link, now)
            if any(entry[2] is transfer for entry in link.ends):
                link.ends = sorted(entry for entry in link.ends if entry[2] is not transfer)
                link.waiting -= 1
            self._plan(link, now)

    def turn(self, link: Link, turn: int, now: float) -> None:
        """The event that `later` was asked for: a transfer has passed a link."""
        if turn != link.turn:
            return
        self._pass(link, now)
        while link.ends and link.ends[0][0] <= link.served * (1 + 1e-12) + 1e-3:
            transfer = heappop(link.ends)[2]
            link.waiting -= 1
            transfer.rest -= 1
            if not transfer.rest:
                self._end(max(now, transfer.earliest), transfer)
        self._plan(link, now)

    def _pass(self, link: Link, now: float) -> None:
        if link.waiting:
            link.served += (now - link.clock) / (link.cost * link.waiting)
        link.clock = now

    def _plan(self, link: Link, now: float) -> None:
        link.turn += 1
        if link.ends:
            wait = (link.ends[0][0] - link.served) * link.cost * link.waiting
            self._later(now + max(wait, 0.0), link, link.turn)
