"""Driving a `Scheduler` by hand: nodes, answers, and a loop that answers honestly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.policy.scheduler import Scheduler
from headrace.cache.tracker.protocol import Answer, Exchange, Peer

ME = Peer("me", "127.0.0.1:1", "a")
NEAR = tuple(Peer(f"near-{number}", f"127.0.0.2:{number}", "a") for number in range(4))
FAR = tuple(Peer(f"far-{number}", f"127.0.0.3:{number}", "b") for number in range(4))


def scheduler(
    chunks: int = 100,
    *,
    order: Sequence[int] | None = None,
    seed: int = 1,
    limits: Limits | None = None,
    size: int = 1 << 20,
) -> Scheduler:
    """One for equal chunks."""
    return Scheduler(sizes=[size] * chunks, order=order, me=ME, seed=seed, limits=limits or Limits())


def asked(one: Scheduler, now: float) -> Exchange:
    """What it says, which has to be something."""
    request = one.ask(now)
    assert request is not None
    return request


def held(chunks: Iterable[int], *holders: Peer, counts: Mapping[int, int] | None = None) -> Answer:
    """These chunks have these holders."""
    found = dict.fromkeys(chunks, holders)
    return Answer(holders=found, counts=counts or dict.fromkeys(found, len(holders)))


def fetches(one: Scheduler, now: float, *holders: Peer) -> list[Fetch]:
    """Ask, answer that these have everything, and start."""
    request = asked(one, now)
    one.answered(request, held(request.wanted, *holders), now)
    return one.start(now)


def finish(one: Scheduler, now: float, flying: Iterable[Fetch] = (), steps: int = 20_000) -> float:
    """Let everything end well: nobody holds anything, each claim is granted, each transfer succeeds.

    Returns:
        when it was done.
    """
    pending = list(flying)
    for _ in range(steps):
        if one.done:
            return now
        request = one.ask(now)
        if request is not None:
            claimed = tuple(request.wanted[: request.claims])
            one.answered(request, Answer(claimed=claimed, counts=dict.fromkeys(request.wanted, 0)), now)
        pending += one.start(now)
        if pending:
            now += 0.001
            lost = [one.finished(fetch, Outcome.DONE, now) for fetch in pending]
            pending = [fetch for losers in lost for fetch in losers]
            for fetch in pending:
                one.finished(fetch, Outcome.CANCELLED, now)
            pending = []
        else:
            now = max(now + 1e-6, one.wake(now))
    raise AssertionError("it does not end")


def without_pauses(limits: Limits | None = None) -> Limits:
    """Limits for examples that look at one thing at a time."""
    return replace(limits or Limits(), poll=0.0, most_poll=0.0)
