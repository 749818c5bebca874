"""The choice of a holder."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from support.scheduled import FAR, ME, NEAR

from headrace.cache.policy.choice import Choice
from headrace.cache.policy.fetch import Outcome
from headrace.cache.policy.limits import Limits
from headrace.cache.tracker.protocol import Peer


@pytest.fixture
def choice() -> Choice:
    return Choice(ME, Limits(per_peer=2), Random(1))


def end(choice: Choice, peer: Peer, outcome: Outcome, now: float, chunk: int = 0, queue: int = 0) -> bool:
    known = choice.known(peer)
    known.flying += 1
    return choice.ended(known, chunk, outcome, now, queue)


def picks(choice: Choice, holders: tuple[Peer, ...], now: float = 0.0, chunk: int = 0) -> Counter[str]:
    found = [choice.pick(chunk, holders, now) for _ in range(200)]
    return Counter(known.peer.id for known in found if known is not None)


def test_near_holders_come_before_far_ones(choice: Choice) -> None:
    assert set(picks(choice, NEAR + FAR)) == {peer.id for peer in NEAR}


def test_far_ones_are_asked_where_the_near_are_busy(choice: Choice) -> None:
    end(choice, NEAR[0], Outcome.BUSY, 0.0)
    assert set(picks(choice, (NEAR[0], *FAR))) == {peer.id for peer in FAR}
    assert picks(choice, (NEAR[0], *FAR), now=1.0).keys() == {NEAR[0].id}


def test_of_two_the_less_busy_is_asked(choice: Choice) -> None:
    choice.known(NEAR[0]).flying = 1
    assert set(picks(choice, NEAR[:2])) == {NEAR[1].id}
    end(choice, NEAR[1], Outcome.DONE, 0.0, queue=5)
    assert set(picks(choice, NEAR[:2])) == {NEAR[0].id}


def test_how_often_a_peer_is_left_alone_is_counted(choice: Choice) -> None:
    strikes = Limits().strikes
    for outcome in (Outcome.DONE, Outcome.BUSY, Outcome.CANCELLED):
        end(choice, NEAR[0], outcome, 0.0)
    assert choice.left_alone == 0
    end(choice, NEAR[0], Outcome.CORRUPT, 0.0)
    assert choice.left_alone == 1
    # Not with each failure that follows while it is left alone already.
    for chunk in range(strikes + 2):
        end(choice, NEAR[1], Outcome.FAILED, 0.0, chunk)
    assert choice.left_alone == 2
    for chunk in range(strikes):
        end(choice, FAR[0], Outcome.MISSING, 0.0, chunk)
    assert choice.left_alone == 3


def test_any_two_may_be_compared(choice: Choice) -> None:
    assert set(picks(choice, NEAR)) == {peer.id for peer in NEAR}


def test_one_peer_gives_only_so_many_at_once(choice: Choice) -> None:
    choice.known(NEAR[0]).flying = 2
    assert choice.pick(0, NEAR[:1], 0.0) is None
    assert choice.free_at(0, NEAR[:1], 0.0) == 0.0


def test_the_node_itself_is_never_asked(choice: Choice) -> None:
    assert choice.pick(0, (ME,), 0.0) is None


def test_a_chunk_that_was_missing_is_not_asked_for_there_again(choice: Choice) -> None:
    assert end(choice, NEAR[0], Outcome.MISSING, 0.0, chunk=7)
    assert choice.pick(7, NEAR[:1], 1e9) is None
    assert choice.free_at(7, NEAR[:1], 1e9) == float("inf")
    assert choice.pick(8, NEAR[:1], 0.0) is not None


def test_who_lies_often_is_left_alone_for_a_while(choice: Choice) -> None:
    for chunk in range(Limits().strikes):
        end(choice, NEAR[0], Outcome.MISSING, 0.0, chunk=chunk)
    assert choice.pick(50, NEAR[:1], Limits().lies - 1) is None
    assert choice.pick(50, NEAR[:1], Limits().lies + 1) is not None


def test_who_sent_wrong_bytes_is_left_alone_for_long_at_once(choice: Choice) -> None:
    assert end(choice, NEAR[0], Outcome.CORRUPT, 0.0, chunk=1)
    assert choice.pick(2, NEAR[:1], Limits().corrupt - 1) is None
    assert choice.pick(2, NEAR[:1], Limits().corrupt + 1) is not None
    assert choice.pick(1, NEAR[:1], Limits().corrupt + 1) is None


def test_failures_make_the_pause_longer_and_success_forgets_them(choice: Choice) -> None:
    pauses = []
    now = 0.0
    for _ in range(4):
        end(choice, NEAR[0], Outcome.FAILED, now)
        pauses.append(choice.free_at(0, NEAR[:1], now) - now)
        now += 100
    assert pauses[0] > 0
    assert all(later > 1.1 * sooner for sooner, later in pairwise(pauses))
    end(choice, NEAR[0], Outcome.DONE, now)
    end(choice, NEAR[0], Outcome.FAILED, now)
    assert choice.free_at(0, NEAR[:1], now) - now < pauses[1]


def test_who_fails_again_and_again_is_reported(choice: Choice) -> None:
    said = [end(choice, NEAR[0], Outcome.FAILED, float(turn)) for turn in range(Limits().strikes)]
    assert said == [False] * (Limits().strikes - 1) + [True]
