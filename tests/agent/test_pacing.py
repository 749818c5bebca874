"""Bandwidth: how it is shared between jobs, and that a waiting pod's job takes it over at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.agents import RunningAgent
from support.command import Command, wait_until

from headrace.cache.bandwidth import KINDS, Class
from headrace.prefetch.pacing import paces
from headrace.prefetch.settings import Bandwidth, Rates

LIMITS = st.one_of(st.just(0), st.integers(2, 10_000_000_000))
RATES = st.builds(Rates, LIMITS, LIMITS, LIMITS, LIMITS)
BANDWIDTHS = st.builds(Bandwidth, RATES, RATES, RATES, LIMITS)


@given(BANDWIDTHS, st.integers(0, 5), st.integers(0, 5))
def test_no_class_and_no_node_gets_more_than_is_said(bandwidth: Bandwidth, demanded: int, ahead: int) -> None:
    running: list[Class] = []
    running += ["demand"] * demanded
    running += ["prestage"] * ahead
    shares = paces(bandwidth, running)
    for kind in KINDS:
        total, held_back = getattr(bandwidth.total, kind), bandwidth.held_back
        demand, prestage = shares["demand"][kind], shares["prestage"][kind]
        for share, count, own in (
            (demand, demanded, getattr(bandwidth.demand, kind)),
            (prestage, ahead, getattr(bandwidth.prestage, kind)),
        ):
            assert share is None or share > 0
            for limit in (own, total):
                if limit and count:
                    assert share is not None
                    assert share * count <= limit * 1.000001
        if total and demanded and ahead:
            assert demand is not None
            assert prestage is not None
            assert demand * demanded + prestage * ahead <= total * 1.000001
        if demanded and ahead and held_back:
            assert prestage is not None
            assert prestage * ahead <= held_back * 1.000001


@given(BANDWIDTHS, st.integers(1, 5))
def test_nobody_is_held_back_for_nobody(bandwidth: Bandwidth, ahead: int) -> None:
    for kind in KINDS:
        own = getattr(bandwidth.prestage, kind) or getattr(bandwidth.total, kind)
        if not own:
            assert paces(bandwidth, ["prestage"] * ahead)["prestage"][kind] is None


SIZE = 400_000_000
RATE = 40_000_000
WINDOW = 0.25


class Moved:
    """How many bytes each of two jobs got, read from the agent's own counters."""

    def __init__(self, agent: RunningAgent) -> None:
        self._client = agent.client

    def now(self) -> dict[str, int]:
        jobs: list[dict[str, Any]] = self._client.ask("GET", "/v1/jobs")["jobs"]
        return {job["reference"].rpartition("/")[2]: job["progress"]["fetched"]["origin"] for job in jobs}

    def within(self, seconds: float) -> dict[str, int]:
        """Bytes that each job got in the next `seconds`."""
        before = self.now()
        time.sleep(seconds)
        return {name: size - before.get(name, 0) for name, size in self.now().items()}


def test_demand_takes_over_a_running_pre_stages_link(headrace: Command, tmp_path: Path) -> None:
    for name in ("ahead", "needed"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "weights.bin").open("wb") as file:
            file.truncate(SIZE)
    settings = {"bandwidth": {"origin": f"{RATE}B/s", "held_back": f"{RATE // 40}B/s"}}
    with RunningAgent(headrace, tmp_path / "agent", settings) as agent:
        moved = Moved(agent)

        def ask(name: str, of: str) -> str:
            request = {"reference": str(tmp_path / name), "chunk": 1 << 18}
            job: dict[str, Any] = agent.client.ask(
                "POST", "/v1/stage", {"request": request, "wait": False, "class": of}
            )
            return str(job["job"])

        def best(of: str) -> dict[str, int]:
            """The window within the next second in which a job got the most."""
            return max((moved.within(WINDOW) for _ in range(4)), key=lambda found: found.get(of, 0))

        ask("ahead", "prestage")
        wait_until(lambda: moved.now()["ahead"] > RATE // 4)
        full = best("ahead")["ahead"]
        assert full > RATE * WINDOW / 3
        needed = ask("needed", "demand")
        time.sleep(1.0)
        assert moved.within(WINDOW)["ahead"] < full / 3
        wait_until(lambda: moved.now()["needed"] > 0)
        # A second long, as what was already in flight may still land at once.
        taken = moved.within(1.0)
        assert taken["needed"] > 4 * taken["ahead"], taken
        # And pre-staging is let go on when nobody waits any more.
        agent.client.ask("DELETE", f"/v1/jobs/{needed}")
        assert best("ahead")["ahead"] > full / 3
