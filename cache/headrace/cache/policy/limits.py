"""How much of everything the policy allows itself."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.cache.errors import UsageError
from headrace.cache.tracker.protocol import MAX_WANTED


@dataclass(frozen=True, slots=True)
class Limits:
    """All times in seconds.

    Attributes:
        window: fraction of the bytes that lie ahead of the first absent chunk, at most.
        least_window: chunks that the window has at least.
        downloads: transfers from peers at once.
        per_peer: of them from one peer.
        first_claims: reads of the origin at once, to begin with.
        claims: reads of the origin at once, when more of them brought more.
        batch: chunks asked about in one exchange.
        ahead: sources are looked for this long before they are needed.
        announce: what nobody else has is announced within this time.
        most_announce: what others have, too, is announced within this time, at the latest.
        poll, most_poll: pause between questions: it doubles from one to the other while they bring nothing.
        crowd: with so many nodes the least of these pauses, and the news of what others have, take twice as long,
            with twice as many three times, and so on,
        most_crowded: but no pause takes longer than this.
        rush: with more nodes for each holder of a chunk than this, not all of them try to get it at once.
        retry, most_retry: the same while the tracker cannot be reached.
        keep: claims in use are confirmed this often.
        held_up: how long a chunk that another node reads may keep the window where it is.
        busy: pause before a busy peer is asked again.
        hedge: no transfer gets a second try before this time,
        hedge_factor: nor before this many times what such a transfer took lately.
        hedge_share: of all transfers that get a second try, at most.
        failed, most_failed: how long a peer is left alone after a failure: it doubles from one to the other.
        strikes: failures in a row, or lies, after which a peer's word is not believed.
        lies: how long a peer that lied so often is left alone.
        corrupt: how long a peer is left alone that sent wrong bytes.
        demand: somebody waits when the run begins: while nobody does no transfer gets a second try.
    """

    window: float = 0.05
    least_window: int = 48
    downloads: int = 6
    per_peer: int = 4
    first_claims: int = 1
    claims: int = 16
    batch: int = MAX_WANTED
    ahead: float = 0.4
    announce: float = 0.02
    most_announce: float = 0.5
    poll: float = 0.01
    most_poll: float = 0.25
    crowd: float = 50.0
    most_crowded: float = 1.0
    rush: float = 16.0
    retry: float = 0.1
    most_retry: float = 2.0
    keep: float = 2.0
    held_up: float = 1.0
    busy: float = 0.02
    hedge: float = 1.0
    hedge_factor: float = 4.0
    hedge_share: float = 0.05
    failed: float = 0.5
    most_failed: float = 30.0
    strikes: int = 3
    lies: float = 30.0
    corrupt: float = 600.0
    demand: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.window <= 1:
            raise UsageError(
                f"window = {self.window} is no fraction of the bytes: give more than 0, at most 1."
            )
        if not 1 <= self.batch <= MAX_WANTED:
            raise UsageError(f"batch = {self.batch} is out of range: give 1 to {MAX_WANTED}.")
        for name in ("least_window", "downloads", "per_peer", "first_claims", "claims", "strikes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} is too small: give at least 1.")
