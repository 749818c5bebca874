"""Redis lost and found again: nothing hangs, nothing that was said meanwhile is forgotten."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.redis_server import RedisServer
from support.trackers import SWARM, Beside, bitmap

from headrace.cache.errors import PeerError
from headrace.cache.tracker.failover import FailoverTracker
from headrace.cache.tracker.protocol import Exchange, Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings
from headrace.cache.tracker.without import Patience, PeerTracker

PATIENCE = 60.0
ME, OTHER = Peer("me", "me:1"), Peer("other", "other:1")


class Maps:
    """What the other node would answer, without the way there."""

    def __init__(self) -> None:
        self.held_there: dict[str, bytes] = {}
        self.asked: list[Peer] = []

    async def held(self, peer: Peer, domain: str, snapshot_id: str, chunks: int) -> bytes:
        self.asked.append(peer)
        if peer.address not in self.held_there:
            raise PeerError("it is not there.")
        return self.held_there[peer.address]


class Node:
    """One node whose way to Redis may be lost."""

    def __init__(self, settings: TrackerSettings, *static: Peer) -> None:
        self.maps = Maps()
        self.changes: list[bool] = []
        self.redis = RedisTracker(settings, ME)
        patience = Patience(fresh=0.01, settle=0.0)
        self.tracker = FailoverTracker(
            self.redis,
            PeerTracker(ME, static, self.maps, "default", patience=patience),
            changed=self.changes.append,
            probe=0.1,
        )

    async def back(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.tracker.degraded:
                await asyncio.sleep(0.02)


def with_node(settings: TrackerSettings, work: Callable[[Node], Awaitable[None]], *static: Peer) -> None:
    async def run() -> None:
        node = Node(settings, *static)
        try:
            await work(node)
        finally:
            await node.tracker.close()

    asyncio.run(run())


def test_a_node_goes_on_with_the_nodes_known_last_and_comes_back(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackerSettings(own_redis.url, timeout=PATIENCE)

    async def work(node: Node) -> None:
        tracker = node.tracker
        other = RedisTracker(settings, OTHER)
        await other.register(OTHER, 600)
        assert await tracker.register(ME, 600)
        assert not await tracker.register(ME, 600)
        assert await tracker.members() == [ME, OTHER]
        node.maps.held_there[OTHER.address] = bitmap(SWARM, [1, 2])

        own_redis.kill()
        answer = await tracker.exchange(SWARM, Exchange(gained=[7], wanted=[1, 3], claims=2))
        assert tracker.degraded and node.changes == [True]
        assert answer.holders == {1: (OTHER,)}
        assert node.maps.asked == [OTHER]
        assert await tracker.members() == [ME, OTHER]
        assert not await tracker.register(ME, 600)
        await tracker.announce(SWARM, bitmap(SWARM, [7]))
        assert await tracker.recall("key") is None
        assert await tracker.once("key", 60, lambda: asyncio.sleep(0, b"asked")) == b"asked"

        own_redis.start()
        await node.back()
        assert node.changes == [True, False]
        assert await tracker.register(ME, 600)
        # What was gained meanwhile is said with the next exchange.
        await tracker.exchange(SWARM, Exchange(gained=[8]))
        assert (await other.look(SWARM, [7, 8])).counts == {7: 1, 8: 1}
        await other.close()

    with caplog.at_level(logging.WARNING):
        with_node(settings, work)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "going on without the tracker, with the nodes known last",
        "the tracker is back",
    ]


def test_a_paused_redis_is_waited_for_once(own_redis: RedisServer) -> None:
    settings = TrackerSettings(own_redis.url, timeout=0.5)

    async def work(node: Node) -> None:
        await node.tracker.exchange(SWARM, Exchange(gained=[1]))
        left = Swarm("left", 10)
        await node.tracker.exchange(left, Exchange(gained=[1]))
        own_redis.pause()
        try:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for i in range(200):
                await node.tracker.exchange(SWARM, Exchange(gained=[2 + i % 50], lost=[1]))
                await node.tracker.look(SWARM, [1])
                await node.tracker.once("key", 1, lambda: asyncio.sleep(0, b"asked"))
            await node.tracker.leave(left)
            # Not for each of the six hundred calls.
            assert loop.time() - began < PATIENCE
            assert node.tracker.degraded
        finally:
            own_redis.resume()
        await node.back()
        await node.tracker.exchange(SWARM, Exchange())
        answer = await node.redis.look(SWARM, [1, 2, 51])
        assert answer.counts == {1: 0, 2: 1, 51: 1}
        assert (await node.redis.look(left, [1])).counts == {1: 0}

    with_node(settings, work)


def test_a_redis_that_is_not_there_at_the_start_is_no_obstacle(own_redis: RedisServer) -> None:
    own_redis.kill()
    settings = TrackerSettings(own_redis.url, timeout=PATIENCE)

    async def work(node: Node) -> None:
        node.maps.held_there[OTHER.address] = bitmap(SWARM, [1])
        answer = await node.tracker.exchange(SWARM, Exchange(wanted=[1]))
        assert answer.holders == {1: (OTHER,)}
        own_redis.start()
        await node.back()
        assert (await node.tracker.exchange(SWARM, Exchange(wanted=[1], claims=1))).claimed == (1,)
        await node.tracker.unregister()

    with_node(settings, work, OTHER)


def test_a_redis_that_cannot_be_used_is_looked_at_less_and_less(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackerSettings(own_redis.url, timeout=PATIENCE)

    async def work(node: Node) -> None:
        with Beside(settings) as beside:
            await node.tracker.exchange(SWARM, Exchange(gained=[1]))
            key = beside.key(":rows")
            beside.client.delete(key)
            beside.client.sadd(key, "something else")
        ends = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < ends:
            await node.tracker.exchange(SWARM, Exchange(gained=[2]))
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING):
        with_node(settings, work)
    # One line for each turn, and each turn takes twice as long as the one before.
    assert 1 <= len([r for r in caplog.records if "going on without" in r.message]) <= 5


def test_the_password_does_not_show_when_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_PASSWORD", "hunter2")
    with RedisServer(tmp_path / "redis", password="another") as server, caplog.at_level(logging.DEBUG):

        async def work(node: Node) -> None:
            await node.tracker.exchange(SWARM, Exchange(gained=[1]))
            assert node.tracker.degraded

        with_node(TrackerSettings(server.url, timeout=PATIENCE), work)
    assert "password" in caplog.text and "hunter2" not in caplog.text
