"""Who owns a chunk when nobody keeps count: the same order of the same nodes, wherever it is worked out."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash


def owners(swarm: str, chunk: int, nodes: Iterable[str], most: int | None = None) -> list[str]:
    """Nodes by their weight for a chunk, the owner first: who comes or goes changes only what was, or is, its own.

    Args:
        swarm: the snapshot's id.
        nodes: names that stay the same while a node lives, each once.
        most: how many, at most; all by default.
    """
    ranked = sorted(nodes, key=lambda node: _weight(swarm, chunk, node), reverse=True)
    return ranked if most is None else ranked[:most]


def owner(swarm: str, chunk: int, nodes: Iterable[str]) -> str | None:
    """The node that owns a chunk; None where there are no nodes."""
    return max(nodes, key=lambda node: _weight(swarm, chunk, node), default=None)


def _weight(swarm: str, chunk: int, node: str) -> tuple[int, str]:
    return xxhash.xxh3_64_intdigest(f"{swarm}\0{chunk}\0{node}".encode()), node
