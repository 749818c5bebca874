"""What the policy is told of and decides on: transfers of chunks, and how they ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from headrace.cache.tracker.protocol import Peer


class Outcome(enum.Enum):
    """How a transfer ended."""

    DONE = "done"
    BUSY = "busy"
    """The peer had no upload slot free."""
    MISSING = "missing"
    """The peer does not have the chunk."""
    CORRUPT = "corrupt"
    """The bytes did not have their digest."""
    FAILED = "failed"
    """Connection refused, cut or stalled."""
    CANCELLED = "cancelled"
    """By us: another transfer of the same chunk was faster, or the chunk came from elsewhere."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A transfer that is to begin now.

    Attributes:
        number: of the transfer in its run.
        chunk: of the swarm.
        peer: from whom; None: from the origin.
        hedges: the transfer that it is a second try beside, if it is one: the first to finish cancels the other.
    """

    number: int
    chunk: int
    peer: Peer | None
    hedges: int | None = None
