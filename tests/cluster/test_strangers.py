"""Nodes that do not belong, or not quite: nothing is lost, and they are told why."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from support.bed import CLAIMS, Bed, Make
from support.cluster import Cluster, Member

pytestmark = [pytest.mark.root, pytest.mark.service]

PATCHED = Path(__file__).parents[1] / "support" / "patched"


def _changed(cluster: Cluster, **environ: str) -> Member:
    """A member whose clock or version is another, started."""
    member = cluster.member()
    path = member.environ["PYTHONPATH"]
    member.environ |= {**environ, "PYTHONPATH": f"{PATCHED}:{path}"}
    member.start()
    return member


def test_a_node_with_another_secret_reads_nothing_from_others(bed: Bed, make: Make) -> None:
    cluster = make(1)
    (one,) = cluster.stage(bed.reference)
    one.check(bed.model)
    bed.origin.reads()
    stranger = cluster.member()
    secret = stranger.folder / "secret"
    secret.write_text(secrets.token_hex(32))
    stranger.settings["peers"]["secrets"] = {"default": str(secret)}
    stranger.start()
    (found,) = cluster.stage(bed.reference, [stranger])
    found.check(bed.model)
    assert found.report is not None
    assert found.report.sources["peer"] == 0
    assert bed.size <= bed.origin.reads().body() <= bed.size * 1.02
    assert "secret" in stranger.log
    for member in cluster.members:
        assert secret.read_text() not in member.log
        assert cluster.secret.read_text().strip() not in member.log


def test_without_the_trackers_password_a_node_claims_nothing(bed: Bed, make: Make) -> None:
    """Who cannot claim cannot keep the others from reading either."""
    cluster = make(2, password="right-and-long-enough")
    intruder = cluster.member()
    wrong = intruder.folder / "password"
    wrong.write_text("wrong")
    intruder.settings["tracker"]["password_file"] = str(wrong)
    intruder.start()
    for found in cluster.stage(bed.reference):
        found.check(bed.model)
    log = "".join(member.log for member in cluster.members)
    assert "right-and-long-enough" not in log
    assert cluster.redis is not None
    assert intruder.address.encode() not in cluster.redis.everything()
    assert cluster.members[0].address.encode() in cluster.redis.everything()


def test_a_node_with_a_wrong_clock_stages_all_the_same_and_says_so(bed: Bed, make: Make) -> None:
    cluster = make(1)
    cluster.stage(bed.reference)[0].check(bed.model)
    late = _changed(cluster, NODE_CLOCK_SKEW="300")
    (found,) = cluster.stage(bed.reference, [late])
    found.check(bed.model)
    assert "clock" in late.log


def test_a_node_whose_address_cannot_be_reached_keeps_nobody_from_staging(bed: Bed, make: Make) -> None:
    """It is nobody's."""
    cluster = make(0)
    (hidden,) = cluster.add(settings={"node": {"address": "10.111.0.250:7700"}})
    cluster.stage(bed.reference, [hidden])[0].check(bed.model)
    bed.origin.reads()
    for found in cluster.stage(bed.reference, cluster.add(2)):
        found.check(bed.model)
    assert bed.origin.reads().body() <= bed.size * 1.01 + 2 * CLAIMS


def test_a_neighbouring_version_takes_part(bed: Bed, make: Make) -> None:
    cluster = make(2)
    _changed(cluster, NODE_PEER_VERSION="1.1")
    found = cluster.stage(bed.reference)
    for one in found:
        one.check(bed.model)
    assert all(one.report is not None and one.report.sources["peer"] > 0 for one in found)
    assert bed.origin.reads().body() <= bed.size * 1.02


def test_another_major_version_is_told_which_to_upgrade(bed: Bed, make: Make) -> None:
    cluster = make(1)
    cluster.stage(bed.reference)[0].check(bed.model)
    newer = _changed(cluster, NODE_PEER_VERSION="2.0")
    (found,) = cluster.stage(bed.reference, [newer])
    found.check(bed.model)
    assert found.report is not None
    assert found.report.sources["peer"] == 0
    assert "upgrade the older" in newer.log
