"""Peers that send wrong bytes, stall, are cut off, lie or speak nonsense: every byte comes from elsewhere, verified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.faulty_relay import MODES
from support.faulty_server import FaultyServer
from support.models import below, published, small_model
from support.swarm import Node, relay, stage_together
from swarm.conftest import Make

from headrace.cache.peers.client import PeerTimeouts
from headrace.cache.policy.limits import Limits
from headrace.cache.staging import StagingJob

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))
# A faulty peer is soon given up, and a slow one soon gets a second try.
QUICK = {
    "limits": Limits(hedge=0.2, failed=0.05, most_failed=0.5, busy=0.01),
    "timeouts": PeerTimeouts(connect=1.0, first_byte=0.5, stall=0.5),
}


@pytest.mark.parametrize(
    ("mode", "vouched"), [*((mode, True) for mode in MODES), ("corrupt", False), ("short", False)]
)
def test_a_faulty_peer_that_alone_has_everything(make: Make, mode: str, vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    with FaultyServer(below("model", files)) as server:
        faulty, nodes = make(), [make(**QUICK) for _ in range(2)]
        reference = f"{server.url}/model"
        faulty.stage(reference)
        server.clear()
        with relay(mode, faulty.address) as address:
            faulty.known_as(address)
            faulty.announce()
            reports = stage_together(nodes, reference)
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
        notes = [note for report in reports for note in report.notes]
        assert (mode == "corrupt") == any("sent wrong bytes" in note for note in notes)


@pytest.mark.parametrize("mode", ["corrupt", "stall"])
def test_a_faulty_peer_beside_a_good_one_costs_the_origin_nothing(make: Make, mode: str) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        good, faulty, node = make(), make(), make(**QUICK)
        reference = f"{server.url}/model"
        stage_together([good, faulty], reference)
        server.clear()
        with relay(mode, faulty.address) as address:
            faulty.known_as(address)
            faulty.announce()
            job = node.job(reference)
            report = job.start().wait()
        assert report.sources == {"origin": 0, "peer": SIZE, "local": 0}
        assert node.files() == MODEL
        if mode == "corrupt":
            assert job.progress.counts["peers_left_alone"] > 0


@contextmanager
def stalling(make: Make, hedge: float) -> Iterator[tuple[Node, StagingJob]]:
    """A node about to stage what two others hold, one of which stalls: nothing but a second try would end that."""
    patient = PeerTimeouts(connect=600.0, first_byte=600.0, stall=600.0)
    with FaultyServer(below("model", MODEL)) as server:
        good, faulty = make(), make()
        node = make(limits=Limits(hedge=hedge, hedge_share=1.0), timeouts=patient)
        reference = f"{server.url}/model"
        stage_together([good, faulty], reference)
        with relay("stall", faulty.address) as address:
            faulty.known_as(address)
            faulty.announce()
            yield node, node.job(reference)


def test_a_transfer_that_stalls_gets_company(make: Make) -> None:
    with stalling(make, hedge=0.2) as (node, job):
        report = job.start().wait()
    assert report.sources == {"origin": 0, "peer": SIZE, "local": 0}
    assert node.files() == MODEL
    assert job.progress.counts["second_tries"] > 0


def test_a_transfer_that_stalls_gets_company_when_somebody_comes_to_wait_for_it(make: Make) -> None:
    with stalling(make, hedge=0.1) as (node, job):
        job.set_pace("prestage", {})
        job.start()
        done = -1
        while job.progress.done != done or not done:
            done = job.progress.done
            time.sleep(0.5)
        # All that is left hangs, for as long as nobody waits.
        assert not job.ended
        assert job.progress.counts["second_tries"] == 0
        job.set_pace("demand", {})
        report = job.wait()
    assert report.sources == {"origin": 0, "peer": SIZE, "local": 0}
    assert node.files() == MODEL
    assert job.progress.counts["second_tries"] > 0


def test_a_node_that_died_is_done_without(make: Make) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        dead, node = make(), make(**QUICK)
        reference = f"{server.url}/model"
        dead.stage(reference)
        dead.known_as("127.0.0.1:1")
        dead.announce()
        began = time.monotonic()
        node.stage(reference)
        assert node.files() == MODEL
        assert time.monotonic() - began < 60
