"""Links: nothing is faster than its rate, and nothing idles."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import pytest
from benchmarks.simulator.links import Link, Queued, Shared, Transfer

from headrace.cache.policy.fetch import Fetch


class Line:
    """A network with its events, and nothing else."""

    def __init__(self, exact: bool) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self.ended: dict[int, float] = {}
        self.network = Shared(self._end, self._turn) if exact else Queued(self._end)

    def _push(self, at: float, happen: Any, *what: Any) -> None:
        heappush(self.events, (at, len(self.events) + int(at * 1e6), happen, what))

    def _end(self, at: float, transfer: Transfer) -> None:
        self._push(at, self._ended, transfer)

    def _ended(self, transfer: Transfer) -> None:
        if not transfer.over:
            self.ended[transfer.fetch.number] = self.now

    def _turn(self, at: float, link: Link, turn: int) -> None:
        assert isinstance(self.network, Shared)
        network = self.network
        self._push(at, lambda link, turn: network.turn(link, turn, self.now), link, turn)

    def begin(self, number: int, size: int, *links: Link, earliest: float = 0.0) -> Transfer:
        transfer = Transfer(Fetch(number, number, None), size, 0, -1)
        self.network.begin(transfer, links, earliest, self.now)
        return transfer

    def run(self, until: float = 1e9) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, happen, what = heappop(self.events)
            happen(*what)
        self.now = max(self.now, until if until < 1e9 else self.now)


@pytest.fixture(params=[True, False], ids=["shared", "queued"])
def line(request: pytest.FixtureRequest) -> Line:
    return Line(request.param)


def test_one_transfer_takes_its_size_over_the_slowest_link(line: Line) -> None:
    line.begin(1, 1000, Link(100.0), Link(50.0), Link(1e9))
    line.run()
    assert line.ended == {1: pytest.approx(20.0)}


def test_a_transfer_ends_no_earlier_than_it_may(line: Line) -> None:
    line.begin(1, 1000, Link(100.0), earliest=15.0)
    line.run()
    assert line.ended == {1: pytest.approx(15.0)}


def test_a_link_passes_what_it_can_and_never_more(line: Line) -> None:
    link = Link(100.0)
    for number in range(10):
        line.begin(number, 1000, link)
    line.run(30.0)
    line.begin(10, 1000, link)
    line.run()
    assert max(line.ended.values()) == pytest.approx(110.0)
    ended = sorted(line.ended.values())
    assert all(at >= 10.0 * (place + 1) - 1e-6 for place, at in enumerate(ended))


def test_a_slow_receiver_does_not_block_the_sender(line: Line) -> None:
    sender = Link(100.0)
    line.begin(1, 1000, sender, Link(1.0))
    line.begin(2, 1000, sender, Link(100.0))
    line.run()
    assert line.ended[2] <= 20.0 + 1e-6
    assert line.ended[1] == pytest.approx(1000.0)


def test_equal_shares_end_together_and_smaller_ones_sooner() -> None:
    line = Line(exact=True)
    link = Link(100.0)
    line.begin(1, 1000, link)
    line.begin(2, 1000, link)
    line.begin(3, 500, link)
    line.run()
    assert line.ended == {
        3: pytest.approx(15.0),
        1: pytest.approx(25.0),
        2: pytest.approx(25.0),
    }


def test_what_is_cut_leaves_its_share_to_the_others() -> None:
    line = Line(exact=True)
    link = Link(100.0)
    cut = line.begin(1, 1000, link)
    line.begin(2, 1000, link)
    line.run(10.0)
    line.network.cut(cut, line.now)
    line.run()
    assert line.ended == {2: pytest.approx(15.0)}
