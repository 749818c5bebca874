"""What is missing hurts only who needs it: an origin that is down, a disk that is full."""

from __future__ import annotations

import pytest
from support.bed import CLAIMS, Bed, Make
from support.mounts import tmpfs

from headrace.cache.errors import NoSpace

pytestmark = [pytest.mark.root, pytest.mark.service]


def test_with_the_origin_down_a_fresh_node_gets_everything_from_the_others(bed: Bed, make: Make) -> None:
    cluster = make(2)
    for found in cluster.stage(bed.reference):
        found.check(bed.model)
    bed.origin.down()
    try:
        fresh = cluster.add()
        # Who has it stages again, and who has nothing, too: what the reference means was asked a moment ago.
        for found in cluster.stage(bed.reference, revalidate="10m"):
            found.check(bed.model)
    finally:
        bed.origin.up()
    assert fresh[0].chunks() == bed.chunks


def test_a_full_disk_fails_on_its_node_alone(bed: Bed, make: Make) -> None:
    cluster = make(3)
    small = cluster.member()
    with tmpfs(small.root, bed.size // 2):
        small.start()
        futures = cluster.begin(bed.reference)
        *good, full = [future.result() for future in futures]
        small.crash()
    assert isinstance(full.error, NoSpace), full
    assert str(small.root) in str(full.error)
    for found in good:
        found.check(bed.model)
    assert bed.origin.reads().body() <= bed.size * 1.01 + CLAIMS
