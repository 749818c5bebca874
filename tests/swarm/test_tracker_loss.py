"""Nodes that share a real Redis, and what becomes of a run when that goes; and nodes that share nothing."""

from __future__ import annotations

import time

import pytest
from support.faulty_server import FaultyServer
from support.models import below, published, small_model
from support.redis_server import RedisServer
from support.swarm import stage_together
from swarm.conftest import Make

pytestmark = pytest.mark.service

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


def sent(server: FaultyServer) -> int:
    return sum(server.bytes_sent(f"model/{path}") for path in MODEL)


@pytest.mark.parametrize("vouched", [False, True], ids=["learned", "published"])
def test_nodes_that_share_a_redis_read_each_byte_once(make_with_redis: Make, vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    nodes = [make_with_redis() for _ in range(3)]
    with FaultyServer(below("model", files), rate=2e7) as server:
        jobs = [node.job(f"{server.url}/model").start() for node in nodes]
        reports = [job.wait() for job in jobs]
        assert sent(server) == SIZE
        assert all(job.progress.counts["tracker_calls"] > 0 for job in jobs)
        counts = [job.progress.counts for job in jobs]
        claims = sum(one["claims"] - one["claims_returned"] for one in counts)
        # Headers that are read to find the chunks are not claimed again.
        assert claims == reports[0].chunks if vouched else 0 < claims <= reports[0].chunks
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
            assert report.notes == ()


def test_a_redis_that_goes_midway_costs_little(make_with_redis: Make, redis: RedisServer) -> None:
    nodes = [make_with_redis() for _ in range(3)]
    with FaultyServer(below("model", MODEL), rate=2e6) as server:
        jobs = [node.job(f"{server.url}/model").start() for node in nodes]
        while any(job.progress.chunks < 5 for job in jobs):
            time.sleep(0.01)
        redis.kill()
        assert server.pace is not None
        server.pace.rate = 2e7
        reports = [job.wait() for job in jobs]
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
            assert any("cannot be reached: this node goes on with the nodes" in note for note in report.notes)
        # Each chunk has one owner without Redis, too; what was being read when it went may be read twice.
        assert sent(server) < 1.5 * SIZE


def test_nodes_that_only_know_each_other_share_the_reading(make_alone: Make) -> None:
    nodes = [make_alone() for _ in range(3)]
    for node in nodes:
        node.others = tuple(other.me for other in nodes)
    with FaultyServer(below("model", MODEL), rate=2e7) as server:
        reports = stage_together(nodes, f"{server.url}/model")
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
        # How little is read twice depends on how soon they hear of each other.
        assert sent(server) < 2 * SIZE


def test_a_redis_that_was_never_there_leaves_a_node_alone(make_with_redis: Make, redis: RedisServer) -> None:
    node = make_with_redis()
    redis.kill()
    with FaultyServer(below("model", MODEL)) as server:
        report = node.stage(f"{server.url}/model")
        assert report.sources["origin"] == SIZE
        assert node.files() == MODEL


def test_two_stagers_of_a_node_fetch_each_chunk_once(make_with_redis: Make) -> None:
    nodes = [make_with_redis() for _ in range(2)]
    with FaultyServer(below("model", MODEL), rate=4e6) as server:
        reports = stage_together(nodes, f"{server.url}/model", workers=2)
        assert sent(server) == SIZE
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
