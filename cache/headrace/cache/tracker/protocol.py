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

MAX_HOLDERS = 4
"""Holders named for one chunk, at most."""

MAX_KIN = 8
"""Snapshots remembered for one address, at most."""

SETTLED = 10.0
"""Seconds after a node's last gain in a swarm until its announcement takes chunks back, too: who announces may
have looked just before a chunk came."""


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
        chunks: how many, in all its files together. Part of the identity: nodes that cut a file differently have
            nothing to exchange.
    """

    id: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a node says and asks, in one batch.

    Attributes:
        gained: chunks that are now here, verified. Their claims, if this node had any, end.
        lost: chunks that are here no more.
        digests: of gained chunks, where no publisher gave them. The first one said of a chunk stays for as long
            as anybody holds it.
        wanted: chunks to find a source for, the most urgent first; at most `MAX_WANTED`. Whoever wants a chunk
            does not hold it.
        claims: how many of them may be claimed now for reading from the origin, at most.
        keep: chunks whose claim is still needed, because their reading goes on. A claim that the tracker has
            lost is made again, unless somebody holds the chunk or another node has claimed it since.
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
        holders: a few of those that have it, at random, some of them of the asking node's zone where there are
            any; at most `MAX_HOLDERS`, never the asking node.
        claimed: this node reads it from the origin, and nobody else does until the lease ends. A claim that it
            has already is named again (and counts among those asked for).
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
    """One node's way to the tracker.

    It is made for one `Peer`, this node. What a call does for a node that is not registered, or no more, it does
    after registering it.
    """

    async def register(self, peer: Peer, seconds: float) -> bool:
        """This node lives, and will for `seconds` unless it says so again before. Clears up after some of those
        that do not live any more.

        Args:
            peer: this node. Another address or zone than before holds in swarms that it joins from then on; its id
                stays the same.
            seconds: until the others take it for gone.

        Returns:
            whether the tracker knows nothing (any more) of what this node holds: everything has to be announced.

        Raises:
            TrackerUnavailable: it cannot be reached.
        """
        ...

    async def unregister(self) -> None:
        """This node goes: it holds and claims nothing any more. Not an error when the tracker cannot be reached."""
        ...

    async def members(self) -> list[Peer]:
        """All nodes that live, this one among them, in the order of their ids; also one that died just now and
        that nobody has cleared up after yet.

        Raises:
            TrackerUnavailable: it cannot be reached.
        """
        ...

    async def announce(self, swarm: Swarm, have: bytes) -> None:
        """The node holds exactly these chunks, and those that it gained within the last `SETTLED` seconds.

        Args:
            have: one bit per chunk, the first chunk in the lowest bit of the first byte.

        Raises:
            TrackerUnavailable: it cannot be reached.
        """
        ...

    async def leave(self, swarm: Swarm) -> None:
        """The node holds and claims nothing of it any more: evicted. Not an error when the tracker cannot be
        reached."""
        ...

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

    async def add_kin(self, key: str, snapshot_id: str) -> None:
        """Note a snapshot as the newest of its address. Not an error when the tracker cannot be reached.

        Args:
            key: digest of trust domain and canonical address.
        """
        ...

    async def kin(self, key: str) -> list[str]:
        """Ids of the last `MAX_KIN` snapshots of an address, the newest first; none where the tracker cannot be
        reached."""
        ...

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        """A value that is found out once per cluster: one that is at most `max_age` seconds old, or that another
        node finds out meanwhile; else this node asks while the others wait for its answer. An `ask` that fails
        lets the next node try.

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

    async def close(self) -> None:
        """End connections. The node stays registered until its time is over."""
        ...
