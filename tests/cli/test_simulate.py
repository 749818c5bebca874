"""`headrace simulate`, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.simulator.case import MIB, Case
from benchmarks.simulator.record import Recorder, recorded
from benchmarks.simulator.world import World
from support.command import Command

from headrace.cache.tracker.protocol import Exchange


def test_the_figures_are_one_json_object(headrace: Command, tmp_path: Path) -> None:
    done = headrace("simulate", "--preset", "large", "--smoke", "--json", "--plot", str(tmp_path / "a.png"))
    figures = json.loads(done.out)
    assert figures["nodes"] == 16
    assert figures["origin_models"] == 1.0
    assert figures["ratio"]["p99"] >= 1.0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_one_run_for_each_number_of_nodes(headrace: Command, tmp_path: Path) -> None:
    target = tmp_path / "growth.png"
    done = headrace("simulate", "--growth", "2", "5", "--model", "0.05", "--json", "--plot", str(target))
    assert [figures["nodes"] for figures in json.loads(done.out)] == [2, 5]
    assert target.exists()


def test_what_cannot_be_is_refused_in_one_sentence(headrace: Command) -> None:
    done = headrace("simulate", "--nodes", "3", "--deaths", "5", code=2)
    assert done.err.count("\n") == 1
    assert "5 deaths" in done.err


def test_recorded_calls_are_read_as_they_were_said(tmp_path: Path) -> None:
    case = Case(nodes=4, model=40 * MIB, deaths=1, death_at=0.5)
    said: list[tuple[float, int, Exchange]] = []
    with Recorder(tmp_path / "calls.gz", case) as recorder:

        def both(at: float, node: int, request: Exchange) -> None:
            said.append((round(at, 6), node, request))
            recorder.said(at, node, request)

        World(case, both).run()
    described, calls = recorded(tmp_path / "calls.gz")
    assert described == {"nodes": 4, "chunks": 10, "zones": 1}
    again = [(call.at, call.node, call.said) for call in calls]
    assert len(again) == len(said)
    for (at, node, one), (at_too, node_too, other) in zip(said, again, strict=True):
        assert (at, node) == (at_too, node_too)
        for name in ("gained", "lost", "wanted", "keep", "give_back", "missing"):
            assert list(getattr(one, name)) == list(getattr(other, name))
        assert one.claims == other.claims
