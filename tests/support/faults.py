"""Faults that strike a cluster while it stages, as data; and what has to hold in the end, whichever it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from support.bed import CLAIMS, Bed
from support.cluster import Cluster, Member, ends
from support.command import wait_until

LASTS = 1.5
"""Seconds until a fault is undone."""

Strike = Callable[[Cluster, Member], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        strike: does it, to a node or to what all share.
        after: undoes it after `LASTS`.
        claims: of how many nodes may the claims be lost, with up to `CLAIMS` bytes each.
        times: how often the origin may send the model besides.
        dies: the agent is gone.
        again: it is started once more then, and stages once more.
        long: only in the campaign; a similar one is always tried.
    """

    name: str
    strike: Strike
    after: Strike | None = None
    claims: int = 1
    times: float = 1.0
    dies: bool = False
    again: bool = False
    long: bool = False


@dataclass(frozen=True)
class Ended:
    """Origin bytes per byte of the model, and whether it was over before the fault struck."""

    origin: float
    early: bool


def suffer(bed: Bed, cluster: Cluster, fault: Fault, victim: Member, at: float) -> Ended:
    """Stage on all nodes; the fault strikes when the victim has so much of its chunks.

    Raises:
        AssertionError: a survivor lacks a byte or hangs, or the origin sent too much.
    """
    futures = cluster.begin(bed.reference)
    own = futures[cluster.members.index(victim)]
    wait_until(lambda: victim.chunks() >= at * bed.chunks or own.done())
    early = own.done()
    fault.strike(cluster, victim)
    if fault.after is not None:
        time.sleep(LASTS)
        fault.after(cluster, victim)
    if fault.again:
        victim.crash()
        victim.start()
        futures += cluster.begin(bed.reference, [victim])
    found = ends(futures)
    good = [one for one in found if one.report is not None]
    for one in good:
        one.check(bed.model)
    lacking = {m.name for m in cluster.members} - {one.member.name for one in good}
    errors = {one.member.name: one.error for one in found if one.report is None}
    may_lack = {victim.name} if fault.dies and not fault.again else set()
    assert lacking <= may_lack, f"{fault.name}: {errors}"
    sent = bed.origin.reads().body()
    allowed = fault.times * bed.size * 1.01 + fault.claims * CLAIMS
    assert bed.size <= sent <= allowed, f"{fault.name}: the origin sent {sent / bed.size:.3f} x the model"
    return Ended(sent / bed.size, early)


def _kill(_: Cluster, victim: Member) -> None:
    victim.kill()


def _crash(_: Cluster, victim: Member) -> None:
    victim.crash()


def _kill_worker(_: Cluster, victim: Member) -> None:
    # There is none when it is over, nor for a moment when one has just ended.
    victim.kill_worker()


def _pause(_: Cluster, victim: Member) -> None:
    victim.pause()


def _resume(_: Cluster, victim: Member) -> None:
    victim.resume()


def _redis_killed(cluster: Cluster, _: Member) -> None:
    assert cluster.redis is not None
    cluster.redis.kill()


def _redis_emptied(cluster: Cluster, _: Member) -> None:
    assert cluster.redis is not None
    cluster.redis.kill()
    cluster.redis.start()


def _redis_paused(cluster: Cluster, _: Member) -> None:
    assert cluster.redis is not None
    cluster.redis.pause()


def _redis_resumed(cluster: Cluster, _: Member) -> None:
    assert cluster.redis is not None
    cluster.redis.resume()


def _parted(cluster: Cluster, _: Member) -> None:
    """Redis is on the side of the first half; both reach the origin."""
    nodes = [member.node for member in cluster.members]
    half = len(nodes) // 2
    cluster.network.cut([*nodes[:half], cluster.network.nodes["redis"]], nodes[half:])


def _healed(cluster: Cluster, _: Member) -> None:
    cluster.network.heal()


FAULTS = (
    Fault("the agent is killed", _kill, dies=True, long=True),
    Fault("the agent is killed, and starts again", _kill, dies=True, again=True),
    Fault("the node crashes", _crash, dies=True),
    Fault("the node crashes, and starts again", _crash, dies=True, again=True, long=True),
    Fault("a staging process is killed", _kill_worker),
    Fault("a node stands still for a while", _pause, _resume),
    Fault("Redis is killed", _redis_killed, claims=4),
    Fault("Redis starts again, empty", _redis_emptied, claims=4),
    Fault("Redis stands still for a while", _redis_paused, _redis_resumed, claims=4),
    Fault("the network parts in two", _parted, claims=4, times=2.0, long=True),
    Fault("the network parts in two for a while", _parted, _healed, claims=4, times=2.0),
)
