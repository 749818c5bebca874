"""Which holder is asked: near before far, the less busy of two, never one that is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from headrace.cache.policy.fetch import Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.tracker.protocol import Peer


class Known:
    """What this node has seen of one peer.

    Attributes:
        flying: transfers from it now.
        queue: how many others it was serving when it last answered.
        until: it is left alone until then.
        failures: in a row.
        lies: chunks that it did not have.
    """

    __slots__ = ("failures", "flying", "lies", "near", "peer", "queue", "until")

    def __init__(self, peer: Peer, near: bool) -> None:
        self.peer = peer
        self.near = near
        self.flying = 0
        self.queue = 0
        self.until = 0.0
        self.failures = 0
        self.lies = 0


class Choice:
    """All that is known of peers, and the choice between them.

    Attributes:
        left_alone: how often one was left alone: for wrong bytes, or as it lied or failed again and again.
    """

    def __init__(self, me: Peer, limits: Limits, random: Random) -> None:
        self._me = me
        self._limits = limits
        self._random = random.random
        self._known: dict[str, Known] = {}
        self._denied: set[tuple[int, str]] = set()
        self.left_alone = 0

    def known(self, peer: Peer) -> Known:
        """What was seen of a peer."""
        found = self._known.get(peer.id)
        if found is None:
            found = self._known[peer.id] = Known(peer, peer.zone == self._me.zone)
        return found

    def denied(self, chunk: int, peer: Peer) -> bool:
        """Whether that peer was asked for that chunk and did not have it."""
        return (chunk, peer.id) in self._denied

    def pick(
        self, chunk: int, holders: Sequence[Peer], now: float, beside: str | None = None
    ) -> Known | None:
        """A holder to ask now, or None where all are busy or left alone.

        Args:
            beside: not this one: it is being asked already.
        """
        known, per_peer, me = self._known, self._limits.per_peer, self._me.id
        denied = self._denied
        near: list[Known] = []
        far: list[Known] = []
        for peer in holders:
            found = known.get(peer.id)
            if found is None:
                found = self.known(peer)
            if (
                found.until > now
                or found.flying >= per_peer
                or (denied and (chunk, peer.id) in denied)
                or peer.id == beside
                or peer.id == me
            ):
                continue
            (near if found.near else far).append(found)
        able = near or far
        count = len(able)
        if count < 2:
            return able[0] if able else None
        one = int(self._random() * count)
        other = int(self._random() * (count - 1))
        if other >= one:
            other += 1
        a, b = able[one], able[other]
        return a if a.flying + a.queue <= b.flying + b.queue else b

    def free_at(self, chunk: int, holders: Sequence[Peer], now: float) -> float:
        """When the first of these holders may be asked again; infinite where none may be asked ever."""
        return min(
            (
                max(self.known(peer).until, now)
                for peer in holders
                if (chunk, peer.id) not in self._denied and peer.id != self._me.id
            ),
            default=float("inf"),
        )

    def useless(self, chunk: int, holders: Sequence[Peer], now: float) -> bool:
        """Whether all of these holders failed again and again, or are left alone for long."""
        for peer in holders:
            known = self.known(peer)
            good = known.failures < self._limits.strikes and known.until <= now + self._limits.held_up
            if good and (chunk, peer.id) not in self._denied and peer.id != self._me.id:
                return False
        return True

    def ended(self, peer: Known, chunk: int, outcome: Outcome, now: float, queue: int) -> bool:
        """Take in how a transfer from a peer ended; True where it should be reported as not having the chunk."""
        peer.flying -= 1
        limits = self._limits
        if outcome is Outcome.DONE:
            peer.failures = 0
            peer.queue = queue
            return False
        if outcome is Outcome.BUSY:
            peer.failures = 0
            peer.queue = queue
            peer.until = max(peer.until, now + limits.busy * (0.5 + self._random()))
            return False
        if outcome is Outcome.MISSING:
            peer.failures = 0
            peer.lies += 1
            self._denied.add((chunk, peer.peer.id))
            if peer.lies >= limits.strikes:
                peer.until = max(peer.until, now + limits.lies)
                peer.lies = 0
                self.left_alone += 1
            return True
        if outcome is Outcome.CORRUPT:
            self._denied.add((chunk, peer.peer.id))
            peer.until = max(peer.until, now + limits.corrupt)
            self.left_alone += 1
            return True
        if outcome is Outcome.FAILED:
            pause = min(limits.failed * 2.0**peer.failures, limits.most_failed)
            peer.failures = min(peer.failures + 1, 32)
            self.left_alone += peer.failures == limits.strikes
            peer.until = max(peer.until, now + pause * (0.75 + self._random() / 2))
            # A holder that nobody can reach must not keep a chunk from being read from the origin.
            return peer.failures >= limits.strikes
        return False
