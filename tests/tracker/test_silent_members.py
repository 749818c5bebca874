"""Without Redis: a member that does not answer costs the others one wait, not one for each question."""

from __future__ import annotations

import asyncio

from headrace.cache.errors import PeerError
from headrace.cache.tracker.protocol import Exchange, Peer, Swarm
from headrace.cache.tracker.without import Patience, PeerTracker

SWARM = Swarm("ab" * 32, 8)


class Silent:
    """Fails once, then never answers."""

    def __init__(self) -> None:
        self.asked = 0

    async def held(self, peer: Peer, domain: str, snapshot_id: str, chunks: int) -> bytes:
        self.asked += 1
        if self.asked == 1:
            raise PeerError("unreachable")
        await asyncio.Event().wait()
        raise AssertionError


async def _ask_twice() -> int:
    maps = Silent()
    patience = Patience(fresh=0.0, wait=3600.0, settle=0.0)
    tracker = PeerTracker(Peer("me", "a:1"), [Peer("other", "b:1")], maps, "default", patience=patience)
    try:
        for _ in range(3):
            await tracker.exchange(SWARM, Exchange(wanted=[0], claims=1))
            await asyncio.sleep(0)
        return maps.asked
    finally:
        await tracker.close()


def test_nobody_waits_for_a_member_that_did_not_answer_before() -> None:
    """Each of these waits is an hour, if it is waited."""
    assert asyncio.run(_ask_twice()) == 2
