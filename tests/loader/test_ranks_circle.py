"""Ranks that talk to each other: values go round, and whoever is missed is named. And who reads what."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.cache.errors import LoadError, UsageError
from headrace.loader.plan import BLOCK, Block
from headrace.loader.ranks import circle
from headrace.loader.ranks.circle import Circle
from headrace.loader.ranks.session import HandOver, Intent, decide
from headrace.loader.ranks.sharing import own_first

HOST = Intent(direct=False, complete=True, present=0.0, whole_plan=True, device="")
DEVICE = Intent(direct=False, complete=True, present=0.0, whole_plan=True, device="cuda")


@contextmanager
def circles(count: int, timeout: float = 30.0) -> Iterator[list[Circle]]:
    """Connected, as by a meeting; the first is the hub."""
    pairs = {rank: socket.socketpair() for rank in range(1, count)}
    hub = Circle(0, range(count), {rank: ours for rank, (ours, _) in pairs.items()}, timeout)
    others = [Circle(rank, range(count), {0: its}, timeout) for rank, (_, its) in pairs.items()]
    with ExitStack() as stack:
        for circle in (hub, *others):
            stack.callback(circle.leave)
        yield [hub, *others]


@contextmanager
def with_a_stranger(timeout: float = 30.0) -> Iterator[tuple[Circle, socket.socket]]:
    """A hub, and the bare socket of rank 1."""
    ours, its = socket.socketpair()
    hub = Circle(0, range(2), {1: ours}, timeout)
    with its, ExitStack() as stack:
        stack.callback(hub.leave)
        yield hub, its


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each gives, or raises, when all run at once."""
    results: list[Any] = [None] * len(calls)

    def run(place: int, call: Callable[[], Any]) -> None:
        try:
            results[place] = call()
        except LoadError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_gets_every_value_in_order() -> None:
    with circles(3) as ranks:
        for _ in range(20):
            values = together(*(lambda one=one: one.gather(one.rank) for one in ranks))
            assert values == [[0, 1, 2]] * 3
        large = "x" * (4 << 20)
        assert together(*(lambda one=one: one.gather(large) for one in ranks)) == [[large] * 3] * 3


def test_who_leaves_after_the_last_value_is_not_missed() -> None:
    with circles(3) as ranks:
        together(*(lambda one=one: (one.gather(1, last=True), one.leave()) for one in ranks))
        assert [one.failure for one in ranks] == [None] * 3


def test_one_rank_alone_needs_nobody() -> None:
    circle = Circle(5, [5], {}, 1.0)
    assert circle.gather("x") == ["x"]
    assert circle.gather("y", last=True) == ["y"]
    circle.leave()


@pytest.mark.parametrize("victim", [0, 1])
def test_all_learn_why_one_failed(victim: int) -> None:
    with circles(3) as ranks:
        waiting = [one for one in ranks if one.rank != victim]
        told: list[int] = []
        for one in waiting:
            one.on_failure = lambda one=one: told.append(one.rank)  # type: ignore[misc]
        said = together(
            *(lambda one=one: one.gather(1) for one in waiting), lambda: ranks[victim].leave("no disk")
        )
        assert said[:2] == [f"loading together stopped, because rank {victim} failed: no disk"] * 2
        for one in waiting:
            one.leave()  # which waits for the thread that tells
        assert sorted(told) == [one.rank for one in waiting]


def test_a_rank_whose_process_ends_is_named() -> None:
    with with_a_stranger() as (hub, other):
        other.close()
        with pytest.raises(LoadError, match="because rank 1 ended, or gave up"):
            hub.gather(1)


def test_a_silent_rank_is_named() -> None:
    with (
        with_a_stranger(timeout=0.3) as (hub, _),
        pytest.raises(LoadError, match="rank 1 gave no sign of life"),
    ):
        hub.gather(1)


def test_a_rank_that_says_nonsense_is_named() -> None:
    with with_a_stranger() as (hub, other):
        other.sendall(b"\x04\0\0\0null")
        with pytest.raises(LoadError, match="because rank 1 sent something unintelligible"):
            hub.gather(1)


def test_a_rank_that_lives_and_does_nothing_is_named() -> None:
    with circles(3, timeout=0.5) as ranks:
        ranks[1].progress = lambda: 7
        ranks[2].progress = time.monotonic_ns
        said = together(lambda: ranks[0].gather(1))
        assert said == ["loading together stopped, because rank 1 has not loaded anything for 0.5 s: "
                        "see what it waits for"]  # fmt: skip


def test_a_rank_that_works_or_waits_may_take_its_time() -> None:
    with circles(3, timeout=2.0) as ranks:
        ranks[1].progress = time.monotonic_ns
        ranks[2].progress = lambda: None

        def late() -> list[Any]:
            time.sleep(3.0)
            return ranks[1].gather(1)

        assert together(lambda: ranks[0].gather(0), late, lambda: ranks[2].gather(2)) == [[0, 1, 2]] * 3


def test_nobody_is_blamed_for_the_time_in_which_the_machine_was_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paused = 0.0
    monkeypatch.setattr(circle, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + paused))
    with circles(3, timeout=5.0) as ranks:

        def late() -> list[Any]:
            nonlocal paused
            paused = 1000.0
            time.sleep(2.0)  # all have looked at the clock
            return ranks[1].gather(1)

        assert together(lambda: ranks[0].gather(0), late, lambda: ranks[2].gather(2)) == [[0, 1, 2]] * 3


# -- who reads what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_every_rank_reads_all_blocks_its_own_share_first(ranks: int, count: int) -> None:
    size = count * BLOCK - 5
    blocks = [Block(n * BLOCK, min(size, (n + 1) * BLOCK), 0) for n in range(count)]
    orders = [own_first(blocks, size, index, ranks) for index in range(ranks)]
    assert all(sorted(order, key=lambda block: block.start) == blocks for order in orders)
    # If all are equally fast, who comes to a block first has read it.
    first: dict[int, int] = {}
    for step in range(count):
        for index, order in enumerate(orders):
            first.setdefault(order[step].start, index)
    shares = [sum(index == one for index in first.values()) for one in range(ranks)]
    if count >= 8 * ranks:
        assert max(shares) - min(shares) <= 8
    # What one reads is needed by all soon after.
    places = [{block.start: place for place, block in enumerate(order)} for order in orders]
    assert all(max(p[b.start] for p in places) - min(p[b.start] for p in places) < 8 * ranks for b in blocks)


@pytest.mark.parametrize(
    ("asked", "intents", "reachable", "way"),
    [
        ("auto", [HOST, HOST], False, "page-cache"),
        ("exchange", [HOST, HOST], False, "exchange"),
        ("auto", [Intent(True, True, 0.0, True, "")] * 2, False, "exchange"),
        ("auto", [DEVICE, DEVICE], True, "exchange"),
        ("auto", [DEVICE, DEVICE], False, "page-cache"),
        ("auto", [Intent(False, True, 0.9, True, "cuda")] * 2, True, "page-cache"),
        ("page-cache", [DEVICE, DEVICE], True, "page-cache"),
        ("exchange", [DEVICE, Intent(False, False, 0.0, True, "cuda")], True, "page-cache"),
        ("exchange", [Intent(False, True, 0.0, False, "cuda")] * 2, True, "page-cache"),
    ],
)
def test_bytes_are_handed_over_the_way_that_fits(
    asked: HandOver, intents: list[Intent], reachable: bool, way: str
) -> None:
    assert decide(asked, intents, reachable)[0] == way


def test_what_cannot_be_meant_is_refused() -> None:
    from headrace.loader import Ranks, load

    with pytest.raises(UsageError, match="hand_over must be one of auto, page-cache, exchange"):
        Ranks(None, hand_over="mail")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="positive"):
        Ranks(None, timeout=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a process group that this process is in"):
        load("anywhere", group=-100)  # type: ignore[arg-type]
