"""A peer that misbehaves, in each way: the others find every byte elsewhere, and take none from it."""

from __future__ import annotations

import pytest
from support import faulty_relay
from support.bed import CLAIMS, Bed, Make
from support.cluster import PEER_PORT

pytestmark = [pytest.mark.root, pytest.mark.service]

_BEHIND = PEER_PORT + 1


@pytest.mark.parametrize("mode", faulty_relay.MODES)
def test_what_a_faulty_peer_says_it_has_comes_from_elsewhere(bed: Bed, make: Make, mode: str) -> None:
    """The faulty one has everything, by the tracker, and the others have nothing to begin with."""
    cluster = make(0)
    faulty = cluster.member()
    faulty.settings["peers"]["listen"] = f"127.0.0.1:{_BEHIND}"
    faulty.settings["node"]["address"] = faulty.address
    faulty.start()
    cluster.stage(bed.reference, [faulty])[0].check(bed.model)
    bed.origin.reads()
    good = cluster.add(3)
    with faulty_relay.start(faulty.node, mode, faulty.address, f"127.0.0.1:{_BEHIND}") as relay:
        try:
            for one in cluster.stage(bed.reference, good):
                one.check(bed.model)
        finally:
            relay.kill()
    sent = bed.origin.reads().body()
    # What a faulty one alone is said to hold nobody may claim until its word is not believed any more.
    assert sent <= bed.size * 1.01 + 3 * CLAIMS, f"the origin sent {sent / bed.size:.3f} x"
