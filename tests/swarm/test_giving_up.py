"""Runs that end before their time: cancelled, killed, or with an origin that does not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.faulty_server import Fault, FaultyServer
from support.models import CHUNK, assert_marks_are_true, below, published, small_model
from support.swarm import Node, SharedSwarms
from swarm.conftest import Make

from headrace.cache.errors import AccessDenied, Interrupted, OriginUnavailable
from headrace.cache.numbering import Numbering
from headrace.cache.stager import StagerLimits
from headrace.cache.store import Store
from headrace.cache.tracker.protocol import Exchange, Swarm

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))
SLOWLY: dict[str, Any] = {"limits": StagerLimits(span=CHUNK, connections=2, reserve=0)}


def sent(server: FaultyServer) -> int:
    return sum(server.bytes_sent(f"model/{path}") for path in MODEL)


def swarm_of(node: Node) -> Swarm:
    with Store.open(node.root, writable=False) as store:
        domain = store.domain()
        (snapshot,) = domain.snapshots()
        return Swarm(snapshot.id, Numbering.of(snapshot.manifest(), domain.name).chunks)


def test_a_cancelled_run_gives_its_claims_back(make: Make, swarms: SharedSwarms) -> None:
    with FaultyServer(below("model", MODEL), rate=1e6) as server:
        node, other = make(), make()
        job = node.job(f"{server.url}/model", **SLOWLY).start()
        while job.progress.chunks < 4:
            time.sleep(0.01)
        job.cancel()
        with pytest.raises(Interrupted):
            job.wait()
        swarm = swarm_of(node)
        everything = range(swarm.chunks)
        answer = swarms.exchange(
            other.me, swarm, Exchange(wanted=everything, claims=len(everything)), time.monotonic()
        )
        assert answer.reading == ()
        # And what it had is known.
        assert {n for n, peers in answer.holders.items() if node.me in peers} == set(answer.holders)
        assert len(answer.holders) == job.progress.chunks
        swarms.exchange(other.me, swarm, Exchange(give_back=answer.claimed), time.monotonic())
        server.pace = None
        had = sent(server)
        first, second = node.stage(f"{server.url}/model"), other.stage(f"{server.url}/model")
        assert node.files() == other.files() == MODEL
        assert first.sources["origin"] + second.sources["origin"] == SIZE - job.progress.fetched["origin"]
        assert sent(server) - had == SIZE - job.progress.fetched["origin"]


@pytest.mark.service
def test_a_node_that_is_killed_midway_is_done_without(make_with_redis: Make) -> None:
    """Its claims end with their lease; its peer server, in this process, keeps giving what it has."""
    with FaultyServer(below("model", MODEL), rate=2e6) as server:
        reference = f"{server.url}/model"
        victim, survivors = make_with_redis(), [make_with_redis() for _ in range(2)]
        task = {"reference": reference, "root": str(victim.root), "cluster": victim.settings.as_json()}
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "support.swarm_victim", json.dumps(task)]
        with subprocess.Popen(command, env=env) as process:
            jobs = [node.job(reference).start() for node in survivors]
            partial = list(victim.root.glob("domains/default/objects/*/map"))
            while not any(is_begun(path) for path in partial) and process.poll() is None:
                time.sleep(0.01)
                partial = list(victim.root.glob("domains/default/objects/*/map"))
            os.kill(process.pid, signal.SIGKILL)
        assert server.pace is not None
        server.pace.rate = 2e7
        reports = [job.wait() for job in jobs]
        for node, report in zip(survivors, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
        assert_marks_are_true(victim.root, MODEL)
        again = victim.stage(reference)
        assert again.sources["origin"] == 0
        assert victim.files() == MODEL


def is_begun(path: Path) -> bool:
    """Whether a chunk map shows a chunk."""
    return b"\1" in path.read_bytes()[4096:]


def test_an_origin_that_answers_nobody_ends_every_run(make: Make) -> None:
    faults = [Fault("status", path="*.safetensors", status=503, nth=nth) for nth in range(5, 500)]
    with FaultyServer(below("model", published(MODEL)), faults=faults) as server:
        jobs = [make().job(f"{server.url}/model").start() for _ in range(2)]
        for job in jobs:
            with pytest.raises(OriginUnavailable):
                job.wait()


def test_an_origin_that_refuses_one_node_does_not_end_its_run_if_peers_have_everything(make: Make) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        reference = f"{server.url}/model"
        make().stage(reference)
        server.faults = (Fault("status", status=403),)
        node = make()
        assert node.stage(reference).sources["peer"] == SIZE
        assert node.files() == MODEL


def test_an_origin_that_refuses_ends_the_run(make: Make) -> None:
    faults = [Fault("status", path="*-00002-*", status=403, nth=nth) for nth in range(3, 99)]
    with FaultyServer(below("model", MODEL), faults=faults) as server, pytest.raises(AccessDenied):
        make().stage(f"{server.url}/model")


def test_a_paused_node_keeps_nobody_waiting(make: Make) -> None:
    with FaultyServer(below("model", published(MODEL)), rate=3e6) as server:
        reference = f"{server.url}/model"
        paused, node = make(), make()
        job = paused.job(reference).start()
        while not job.progress.chunks:
            time.sleep(0.01)
        # What it has claimed and is reading it gives back.
        job.set_pace("prestage", {"origin": 0.0})
        assert sum(node.stage(reference).sources.values()) == SIZE
        assert node.files() == MODEL
        # All the rest comes from the other.
        assert sum(job.wait().sources.values()) == SIZE
        assert paused.files() == MODEL


def test_another_pace_counts_at_once(make: Make) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        node = make()
        job = node.job(f"{server.url}/model")
        job.set_pace("prestage", {"origin": 0.0})
        job.start()
        job.wait_prepared()
        time.sleep(0.2)
        assert job.progress.chunks == 0
        job.set_pace("demand", {})
        assert job.wait().sources["origin"] == SIZE
        assert node.files() == MODEL
