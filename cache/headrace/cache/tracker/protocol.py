"""What a tracker is asked and what it answers, whoever it is: Redis, other nodes, or a simulation.

The unit is the swarm of one snapshot: its chunks are numbered through all its files, in the order of the
manifest (see `Swarm`). A node says in one batch what it gained and what it wants next, and gets for each wanted
chunk a few holders, or the claim to read it from the origin, or the news that another node is reading it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MAX_WANTED = 64
"""Chunks that one exchange asks about, at most."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's agent, or this one.

    Attributes:
        id: of the node's agent since it started: another after each start.
        address: "host:port" of its peer server.
        zone: nodes of one zone are near each other; "" where nobody said.
    """

    id: str
    address: str
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Swarm:
    """All nodes that have or want one snapshot.

    Attributes:
        id: the snapshot's id; it includes the trust domain.
        chunks: how many, in all its files together.
    """

    id: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a node says and asks, in one batch.

    Attributes:
        gained: chunks that are now here, verified.
        lost: chunks that are here no more.
        digests: of gained chunks, where no publisher gave them.
        wanted: chunks to find a source for, the most urgent first; at most `MAX_WANTED`.
        claims: how many of them may be claimed now for reading from the origin, at most.
        keep: chunks whose claim is still needed, because their reading goes on.
        give_back: claimed chunks that will not be read after all.
        missing: (chunk, peer id): a holder that did not have it.
    """

    gained: Sequence[int] = ()
    lost: Sequence[int] = ()
    digests: Mapping[int, bytes] = field(default_factory=dict)
    wanted: Sequence[int] = ()
    claims: int = 0
    keep: Sequence[int] = ()
    give_back: Sequence[int] = ()
    missing: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of each wanted chunk. A chunk is in `holders`, in `claimed`, in `reading`, or in none of
    them: then nobody has it, and the node had asked for no more claims.

    Attributes:
        holders: a few of those that have it, never the asking node.
        claimed: this node reads it from the origin, and nobody else does until the lease ends.
        reading: another node has the claim.
        counts: how many nodes have it.
        digests: learned ones, of chunks with holders.
    """

    holders: Mapping[int, tuple[Peer, ...]] = field(default_factory=dict)
    claimed: tuple[int, ...] = ()
    reading: tuple[int, ...] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    digests: Mapping[int, bytes] = field(default_factory=dict)


class Tracker(Protocol):
    """One node's way to the tracker."""

    async def exchange(self, swarm: Swarm, request: Exchange) -> Answer:
        """Say and ask.

        Raises:
            TrackerUnavailable: it cannot be reached; nothing may be concluded about what it took in.
        """
        ...

    async def look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        """Holders of chunks of a swarm that this node does not belong to; claims nothing.

        Raises:
            TrackerUnavailable: it cannot be reached.
        """
        ...

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        """A value that is found out once per cluster: remembered for `max_age` seconds, else asked by one node
        while the others wait for its answer. An `ask` that fails lets the next node try.

        Raises:
            whatever `ask` raises.
        """
        ...

    async def remember(self, key: str, value: bytes, seconds: float) -> None:
        """Keep a value for all nodes, for a time. Not an error when the tracker cannot be reached."""
        ...

    async def recall(self, key: str) -> bytes | None:
        """A value that a node of this cluster remembered; None where it is not known, or not reachable."""
        ...
