"""What simulated clusters come to, small ones."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from benchmarks.simulate import growth, simulate
from benchmarks.simulator.case import GBIT, MIB, PRESETS, Case, llama
from benchmarks.simulator.curve import Curve, Tensors
from benchmarks.simulator.result import Result
from benchmarks.simulator.world import World

from headrace.cache.errors import UsageError

SMALL = Case(nodes=8, model=200 * MIB, chunk=4 * MIB)


@pytest.mark.parametrize("exact", [True, False], ids=["shared", "queued"])
@pytest.mark.parametrize("nodes", [1, 2, 8, 40])
def test_every_node_gets_every_byte_and_the_origin_gives_each_once(nodes: int, exact: bool) -> None:
    case = replace(SMALL, nodes=nodes, exact=exact, seed=nodes)
    world = World(case)
    world.run()
    assert world.counts.arrived == nodes * case.model
    assert world.counts.origin == case.model
    assert world.counts.origin + world.counts.peers == nodes * case.model
    assert all(node.here == b"\1" * len(world.sizes) for node in world.nodes)


def test_a_seed_gives_one_run() -> None:
    assert replace(simulate(SMALL), cpu=0.0) == replace(simulate(SMALL), cpu=0.0)
    assert simulate(SMALL).times != simulate(replace(SMALL, seed=2)).times


def test_no_run_beats_the_bound() -> None:
    for case in (SMALL, replace(SMALL, exact=False), replace(SMALL, origin=0.1 * GBIT)):
        assert simulate(case).at(1.0) >= case.bound()


@pytest.mark.parametrize("seed", range(4))
def test_the_test_cluster_is_done_in_time(seed: int) -> None:
    result = simulate(replace(PRESETS["cluster"], seed=seed))
    assert result.at(1.0) <= 1.25 * result.case.bound()
    assert result.origin == 1.0
    assert result.curve >= 0.8


@pytest.mark.parametrize("seed", range(4))
def test_a_slow_node_does_not_hold_up_the_others(seed: int) -> None:
    result = simulate(replace(PRESETS["slow"], seed=seed))
    assert result.at(1.0) <= 1.4 * result.case.bound()
    assert result.unfinished == 0


def test_what_only_a_slow_node_has_soon_comes_from_others() -> None:
    """Taken from there by all others at once, it would be the last chunk of each of them."""
    plain = PRESETS["slow"]
    ends = []
    for seed in range(8):
        case = replace(plain, seed=seed, up=plain.up / 4, down=plain.down / 4, origin=plain.origin / 4)
        world = World(replace(case, slow_rate=plain.slow_rate / 4))
        world.run()
        ends.append(max(node.finished for node in world.nodes if not node.slow))
    assert statistics.mean(ends) <= 1.1 * replace(case, slow=0).bound()


@pytest.mark.parametrize("seed", range(4))
def test_a_death_costs_the_others_a_lease_at_most_and_the_origin_what_was_claimed(seed: int) -> None:
    case = replace(PRESETS["death"], seed=seed)
    result = simulate(case)
    assert result.unfinished == 0
    assert len(result.times) == case.nodes - 1
    assert result.at(1.0) <= case.death_at + case.lease + 1.0
    assert 1.0 <= result.origin <= 1.0 + 4 * case.chunk / case.model


def test_most_may_die() -> None:
    result = simulate(replace(SMALL, nodes=12, deaths=8, death_at=1.0, death_spread=3.0))
    assert result.unfinished == 0
    assert len(result.times) == 4


def test_nodes_that_come_later_read_nothing_from_the_origin() -> None:
    case = replace(SMALL, nodes=9, warm=8 / 9)
    result = simulate(case)
    assert result.origin == 0
    assert len(result.times) == 1
    assert result.at(1.0) <= 1.5 * case.bound()


def test_nodes_may_come_over_time() -> None:
    result = simulate(replace(SMALL, join_over=20.0))
    assert result.origin == 1.0
    assert result.seconds >= 17.5


def test_little_goes_from_zone_to_zone() -> None:
    result = simulate(replace(SMALL, nodes=30, zones=3, zone_rate=4 * GBIT))
    assert result.unfinished == 0
    # Two thirds of all holders are in another zone.
    assert 0 < result.far < 0.5 * result.counts["peer_bytes"]


def test_queued_links_give_about_the_times_of_shared_ones() -> None:
    case = replace(SMALL, nodes=24, model=400 * MIB)
    exact, quick = simulate(replace(case, exact=True)), simulate(replace(case, exact=False))
    assert quick.at(0.99) == pytest.approx(exact.at(0.99), rel=0.25)


def test_calls_are_counted() -> None:
    said: list[int] = []
    world = World(SMALL, lambda at, node, request: said.append(len(request.gained)))
    world.run()
    result = Result.of(world, 0.0)
    assert len(said) == result.counts["calls"]
    assert sum(said) == result.counts["told"]


def test_larger_clusters_have_fewer_chunks() -> None:
    case = growth(PRESETS["large"], 10_000)
    assert case.nodes == 10_000
    assert case.model == PRESETS["large"].model
    assert len(case.sizes()) == 140
    assert growth(PRESETS["large"], 100) == replace(PRESETS["large"], nodes=100)


def test_the_bound_is_that_of_the_narrowest_way() -> None:
    case = Case(nodes=10, model=1000, chunk=10, up=10.0, down=1000.0, origin=100.0)
    assert case.bound() == pytest.approx(10 * 1000 / (100 + 10 * 10))
    assert replace(case, down=1.0).bound() == pytest.approx(1000)
    assert replace(case, origin=0.5).bound() == pytest.approx(2000)
    assert replace(case, warm=1.0).bound() == 0.0


def test_a_llama_has_the_bytes_that_are_asked_for() -> None:
    tensors = llama(140 * 10**9)
    assert sum(tensors) == 140 * 10**9
    assert min(tensors) > 0
    assert len(tensors) == 723


def test_a_tensor_is_complete_with_its_last_chunk() -> None:
    # Chunks of 10 bytes; the second tensor is larger than 5 % and not counted.
    tensors = Tensors([4, 92, 4], 10, 10)
    curve = Curve(tensors)
    assert tensors.total == 8
    curve.arrived(0)
    assert curve.points[-1] == (0.5, 0.5)
    curve.arrived(9)
    assert curve.points[-1] == (1.0, 1.0)
    assert curve.worst == 1.0
    straddling = Curve(Tensors([2] * 50, 5, 20))
    for chunk in (1, 3, 0, *range(4, 20), 2):
        straddling.arrived(chunk)
    assert straddling.worst < 1.0
    assert straddling.points[-1] == (1.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"warm": 2.0},
        {"deaths": 9},
        {"slow": 9},
        {"tensors": (1, 2)},
        {"up": 0.0},
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(SMALL, **wrong)  # type: ignore[arg-type]
