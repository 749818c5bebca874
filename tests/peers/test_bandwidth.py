"""Bandwidth: buckets never give more than their rate, always give in the end, and notice changes at once."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.bandwidth import CLASSES, KINDS, PIECE, Allowance, Bandwidth, Bucket

LATE = 30.0
BURST = 0.05

rates = st.one_of(st.none(), st.just(0.0), st.floats(1e3, 1e9))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0, 10)),
        st.tuples(st.just("take"), st.integers(1, PIECE)),
        st.tuples(st.just("rate"), rates),
    ),
    max_size=60,
)


@given(st.floats(1e3, 1e9), st.lists(st.tuples(st.floats(0, 3), st.integers(1, PIECE)), max_size=60))
def test_no_time_however_long_or_short_brings_more_than_its_rate_and_one_piece(
    rate: float, asked: list[tuple[float, int]]
) -> None:
    bucket, now = Bucket(rate, 0.0), 0.0
    given: list[tuple[float, int]] = []
    for passed, size in asked:
        now += passed
        if bucket.take(size, now) == 0:
            given.append((now, size))
    for first in range(len(given)):
        for last in range(first, len(given)):
            moved = sum(size for _, size in given[first : last + 1])
            time = given[last][0] - given[first][0]
            assert moved <= rate * (time + BURST) + PIECE + 1


@given(rates, steps)
def test_whoever_waits_as_long_as_it_is_told_gets_its_piece(
    rate: float | None, asked: list[tuple[str, float]]
) -> None:
    bucket, now = Bucket(rate, 0.0), 0.0
    for what, value in asked:
        if what == "pass":
            now += value or 0
        elif what == "rate":
            bucket.set_rate(value, now)
        else:
            wait = bucket.take(int(value), now)
            assert math.isinf(wait) == (bucket.rate == 0)
            if 0 < wait < math.inf:
                now += wait * (1 + 1e-9) + 1e-9
                assert bucket.take(int(value), now) == 0


@given(st.floats(1e5, 1e9))
def test_who_asks_all_the_time_gets_nearly_the_whole_rate(rate: float) -> None:
    bucket, now, moved = Bucket(rate, 0.0), 0.0, 0
    while moved < 200 * PIECE:
        wait = bucket.take(PIECE, now)
        if wait:
            now += wait * (1 + 1e-9) + 1e-9
        else:
            moved += PIECE
    assert moved >= rate * now * 0.99


def test_a_clock_that_stands_still_or_goes_back_gives_nothing_more() -> None:
    bucket = Bucket(1000.0, 10.0)
    assert bucket.take(500, 10.0) == 0
    wait = bucket.take(1, 10.0)
    assert wait == pytest.approx(0.5)
    assert bucket.take(1, 5.0) == pytest.approx(0.5)


def test_nothing_is_limited_until_somebody_says_so() -> None:
    bandwidth = Bandwidth()
    for kind in KINDS:
        for of in CLASSES:
            assert bandwidth.rate(kind, of) is None
            assert bandwidth.take(kind, of, PIECE)


def test_a_class_and_a_kind_have_their_own_rate() -> None:
    bandwidth = Bandwidth({("peers", "prestage"): 0.0})
    assert bandwidth.take("peers", "demand", PIECE)
    assert bandwidth.take("origin", "prestage", PIECE)
    assert not bandwidth.take("peers", "prestage", 1, stop=lambda: True)


def waiting(work: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, done


@pytest.mark.parametrize("rate", [None, 1e9])
def test_who_waits_for_a_paused_class_goes_on_when_it_may(rate: float | None) -> None:
    bandwidth = Bandwidth({("disk", "prestage"): 0.0})
    thread, done = waiting(lambda: bandwidth.take("disk", "prestage", PIECE))
    assert not done.wait(0.15)
    bandwidth.set_rate("disk", "prestage", rate)
    assert done.wait(LATE)
    thread.join()


def test_who_waits_can_be_told_to_stop() -> None:
    bandwidth, stop = Bandwidth({("disk", "demand"): 0.0}), threading.Event()
    given: list[bool] = []
    thread, done = waiting(lambda: given.append(bandwidth.take("disk", "demand", 1, stop.is_set)))
    stop.set()
    assert done.wait(LATE)
    thread.join()
    assert given == [False]


def test_a_task_waits_without_keeping_the_others_from_running_and_can_be_cancelled() -> None:
    bandwidth = Bandwidth({("origin", "prestage"): 0.0})

    async def main() -> None:
        first = asyncio.create_task(bandwidth.taken("origin", "prestage", 1))
        second = asyncio.create_task(bandwidth.taken("origin", "prestage", 1))
        await asyncio.sleep(0.1)
        assert not first.done()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        bandwidth.set_rate("origin", "prestage", None)
        await asyncio.wait_for(second, LATE)

    asyncio.run(main())


def test_many_threads_together_get_no_more_than_the_rate() -> None:
    rate = 20 * PIECE
    clock = [0.0]
    bandwidth = Bandwidth({("peers", "demand"): float(rate)}, clock=lambda: clock[0])
    moved = 0
    counting = threading.Lock()
    ended = threading.Event()

    def work() -> None:
        nonlocal moved
        while bandwidth.take("peers", "demand", PIECE // 4, ended.is_set):
            with counting:
                moved += PIECE // 4

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for tick in range(1, 21):
        clock[0] = tick / 40
        # Each look of a waiter is at most a twentieth of a second away.
        threading.Event().wait(0.06)
    ended.set()
    for thread in threads:
        thread.join()
    assert 0 < moved <= rate * (clock[0] + BURST) + PIECE


@given(st.floats(1e5, 1e8), st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, PIECE)), max_size=40))
def test_a_transfer_that_moves_in_small_steps_moves_no_more_than_the_rate(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    clock = [0.0]
    bandwidth = Bandwidth({("peers", "demand"): rate}, clock=lambda: clock[0])
    transfer = Allowance(bandwidth, "demand", stop=lambda: True)
    left, moved = 40 * PIECE, 0
    for passed, most in steps:
        clock[0] += passed
        allowed = transfer.ask(left - moved)
        assert 0 <= allowed <= PIECE
        transfer.used(min(most, allowed))
        moved += min(most, allowed)
        assert moved <= rate * (clock[0] + BURST) + PIECE


def test_a_transfer_notices_with_its_next_step_that_it_is_limited_or_free() -> None:
    bandwidth = Bandwidth()
    transfer = Allowance(bandwidth, "prestage", stop=lambda: True)
    assert transfer.ask(50 * PIECE) == 50 * PIECE
    transfer.used(PIECE)
    bandwidth.set_rate("peers", "prestage", 0)
    assert transfer.ask(49 * PIECE) == 0
    bandwidth.set_rate("peers", "prestage", 1e9)
    assert transfer.ask(49 * PIECE) == PIECE
    transfer.used(100)
    assert transfer.ask(49 * PIECE - 100) == PIECE - 100
    transfer.used(PIECE - 100)
    bandwidth.set_rate("peers", "prestage", None)
    assert transfer.ask(48 * PIECE) == 48 * PIECE
