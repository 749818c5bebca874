"""Where each chunk stands: not looked at yet, to be asked about, with known holders, put off, under way, here.

Queues are heaps whose old entries are dropped when they come up: a chunk is in the state that its byte says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from heapq import heappop, heappush
from math import inf

from headrace.cache.tracker.protocol import Peer


class Stand(IntEnum):
    """The state of one chunk."""

    CLOSED = 0
    """Outside the window, nothing is done about it."""
    POOL = 1
    """To be asked about."""
    ASKED = 2
    """In the exchange that is under way."""
    KNOWN = 3
    """Holders are known."""
    CLAIMED = 4
    """To be read from the origin."""
    LATER = 5
    """To be tried again, or asked about, after a pause."""
    FLYING = 6
    TAKEN = 7
    """Another stager of this node fetches it."""
    HERE = 8


_POOL, _ASKED, _KNOWN, _LATER = map(int, (Stand.POOL, Stand.ASKED, Stand.KNOWN, Stand.LATER))


class Board:
    """The states of all chunks of a swarm, and the queues of those that wait.

    Attributes:
        state: a `Stand` for each chunk; written by the queues' methods, and by the scheduler for the other states.
        pooled: chunks to be asked about.
        stocked: chunks with known holders.
        rest_at: no pause is over before.
    """

    __slots__ = ("_holders", "_later", "_pool", "_random", "_stock", "pooled", "rest_at", "state", "stocked")

    def __init__(self, chunks: int, random: Callable[[], float]) -> None:
        self.state = bytearray(chunks)
        self.pooled = 0
        self.stocked = 0
        self.rest_at = inf
        self._random = random
        self._pool: list[tuple[float, int]] = []
        self._stock: list[tuple[int, float, int]] = []
        self._later: list[tuple[float, int]] = []
        self._holders: dict[int, Sequence[Peer]] = {}

    def move(self, chunk: int, stand: Stand) -> None:
        """Take a chunk out of whatever queue it is in, to a state without one."""
        self._leave(chunk)
        self.state[chunk] = stand

    def _leave(self, chunk: int) -> None:
        state = self.state[chunk]
        if state == _POOL:
            self.pooled -= 1
        elif state == _KNOWN:
            self.stocked -= 1
            del self._holders[chunk]
        elif state == _LATER:
            self._holders.pop(chunk, None)

    def offer(self, chunk: int, key: float) -> None:
        """To be asked about; the smallest key first."""
        self._leave(chunk)
        self.state[chunk] = _POOL
        self.pooled += 1
        heappush(self._pool, (key, chunk))

    def choose(self, most: int) -> list[int]:
        """The next chunks to ask about: they are `ASKED` then."""
        chosen: list[int] = []
        pool, state = self._pool, self.state
        while pool and len(chosen) < most:
            chunk = heappop(pool)[1]
            if state[chunk] == _POOL:
                state[chunk] = _ASKED
                chosen.append(chunk)
        self.pooled -= len(chosen)
        return chosen

    def know(self, chunk: int, rank: int, holders: Sequence[Peer]) -> None:
        """Holders of a chunk are known; the smallest rank first, random among equals."""
        self._leave(chunk)
        self.state[chunk] = _KNOWN
        self.stocked += 1
        self._holders[chunk] = holders
        heappush(self._stock, (rank, self._random(), chunk))

    def hasten(self, chunk: int, rank: int) -> None:
        """A chunk with known holders gets a smaller rank."""
        heappush(self._stock, (rank, self._random(), chunk))

    def next_known(self) -> tuple[int, Sequence[Peer]] | None:
        """The first chunk with known holders, taken out of its queue; the caller gives it a new state at once."""
        stock, state = self._stock, self.state
        while stock:
            chunk = heappop(stock)[2]
            if state[chunk] == _KNOWN:
                self.stocked -= 1
                state[chunk] = 0
                return chunk, self._holders.pop(chunk)
        return None

    def put_off(self, chunk: int, until: float, holders: Sequence[Peer] = ()) -> None:
        """To be asked about after a pause, or to be tried again with the same holders."""
        self._leave(chunk)
        self.state[chunk] = _LATER
        if holders:
            self._holders[chunk] = holders
        if until < self.rest_at:
            self.rest_at = until
        heappush(self._later, (until, chunk))

    def rested(self, now: float) -> list[tuple[int, Sequence[Peer]]]:
        """Chunks whose pause is over, and the holders to try; the caller gives each a new state."""
        later, state = self._later, self.state
        over: list[tuple[int, Sequence[Peer]]] = []
        while later:
            until, chunk = later[0]
            if state[chunk] == _LATER:
                if until > now:
                    break
                over.append((chunk, self._holders.pop(chunk, ())))
                state[chunk] = 0
            heappop(later)
        self.rest_at = later[0][0] if later else inf
        return over
