"""Names of the keys in Redis. All keys of one swarm carry its name as their hash tag."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from headrace.cache.tracker.protocol import Swarm


def swarm_name(swarm: Swarm) -> str:
    """A swarm as keys name it: the same snapshot cut differently is another swarm."""
    return f"{swarm.id}.{swarm.chunks}"


def swarm_of(name: bytes) -> Swarm:
    """The swarm of a name. Raises ValueError."""
    snapshot, _, chunks = name.decode().rpartition(".")
    return Swarm(snapshot, int(chunks))


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys under one prefix.

    ============================  ====================================================================
    `{<swarm>}:rows`              bitmap: a row per chunk, a column per node
    `{<swarm>}:nodes`             hash: `m` how rows are laid out, `n:<id>` its column, `s:<column>` its
                                  owner, `z:<zone>` blocks of 64 columns, `b:<block>` its zone,
                                  `f:<zone>` free columns, `t:<id>` last gain, `r:<id>` cleared so far
    `{<swarm>}:claims`            hash: chunk, until when and who
    `{<swarm>}:digests`           hash: chunk, learned digest with its MAC
    `node:<id>`                   a node that lives: token, id, address, zone
    `swarms:<id>`                 set: swarms in which it has a column
    `deadlines`                   sorted set: until when each node lives
    `members`                     another token whenever a node comes, changes or is cleared up after
    `clears:<id>`                 who clears up after a node that is gone
    `value:…`, `lock:…`, `kin:…`  what was found out, by whom it is being found out, snapshots of an address
    ============================  ====================================================================
    """

    prefix: str

    def swarm(self, swarm: Swarm) -> tuple[str, str, str, str]:
        """Rows, nodes, claims, digests.

        Short ones: Redis hands names of up to 64 bytes to a script's commands faster than longer ones.
        """
        start = f"{self.prefix}{{{_short(swarm_name(swarm))}}}"
        return f"{start}:rows", f"{start}:nodes", f"{start}:claims", f"{start}:digests"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}:deadlines"

    @property
    def members(self) -> str:
        return f"{self.prefix}:members"

    def node(self, node: str) -> str:
        return f"{self.prefix}:node:{node}"

    def swarms(self, node: str) -> str:
        return f"{self.prefix}:swarms:{node}"

    def clears(self, node: str) -> str:
        return f"{self.prefix}:clears:{node}"

    def value(self, key: str) -> str:
        return f"{self.prefix}:value:{_short(key)}"

    def lock(self, key: str) -> str:
        return f"{self.prefix}:lock:{_short(key)}"

    def kin(self, key: str) -> str:
        return f"{self.prefix}:kin:{_short(key)}"


def _short(key: str) -> str:
    """A key of any length and content as one of a known length."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]
