"""Peers that misbehave, each in its way: the others find every byte elsewhere, and take none from them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from support import faulty_relay
from support.bed import CLAIMS, Bed, Make
from support.cluster import PEER_PORT

pytestmark = [pytest.mark.root, pytest.mark.service]

_BEHIND = PEER_PORT + 1


@pytest.mark.parametrize("modes", [("corrupt", "stall"), ("lie", "garbage")], ids="-".join)
def test_what_only_faulty_peers_have_comes_from_elsewhere(
    bed: Bed, make: Make, modes: tuple[str, ...]
) -> None:
    """Two faulty ones have everything, by the tracker, and the others have nothing to begin with."""
    cluster = make(0)
    faulty = [cluster.member() for _ in modes]
    for member in faulty:
        member.settings["peers"]["listen"] = f"127.0.0.1:{_BEHIND}"
        member.settings["node"]["address"] = member.address
    with ExitStack() as stack:
        for member in faulty:
            member.start(wait=False)
        good = cluster.add(2)
        for member in faulty:
            member.wait_ready()
            # Each by itself: nobody can be reached yet.
            for found in cluster.stage(bed.reference, [member]):
                found.check(bed.model)
        bed.origin.reads()
        for member, mode in zip(faulty, modes, strict=True):
            relay = stack.enter_context(
                faulty_relay.start(member.node, mode, member.address, f"127.0.0.1:{_BEHIND}")
            )
            stack.callback(relay.kill)
        for one in cluster.stage(bed.reference, good):
            one.check(bed.model)
    sent = bed.origin.reads().body()
    assert sent <= bed.size * 1.01 + len(good) * CLAIMS, f"the origin sent {sent / bed.size:.3f} x"
