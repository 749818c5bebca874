"""Nodes for the tests of one staging run in a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.redis_server import BINARY, RedisServer
from support.swarm import Node, SharedSwarms

from headrace.cache.tracker.memory import MemorySwarms
from headrace.cache.tracker.settings import TrackerSettings

Make = Callable[..., Node]


@pytest.fixture
def swarms() -> SharedSwarms:
    return SharedSwarms()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip("redis-server is not installed: make tools")
    with RedisServer(tmp_path / "redis") as server:
        yield server


def _making(folder: Path, shared: MemorySwarms | TrackerSettings | None) -> Iterator[Make]:
    with ExitStack() as stack:
        count = 0

        def one(**how: Any) -> Node:
            nonlocal count
            count += 1
            return stack.enter_context(Node(folder / f"node{count}", shared, **how))

        yield one


@pytest.fixture
def make(tmp_path: Path, swarms: SharedSwarms) -> Iterator[Make]:
    """Another node, running; the nodes share memory."""
    yield from _making(tmp_path, swarms)


@pytest.fixture
def make_with_redis(tmp_path: Path, redis: RedisServer) -> Iterator[Make]:
    """Another node, running; the nodes share a Redis."""
    yield from _making(tmp_path, TrackerSettings(redis.url, lease=2.0, timeout=0.5))


@pytest.fixture
def make_alone(tmp_path: Path) -> Iterator[Make]:
    """Another node, running; the nodes share nothing."""
    yield from _making(tmp_path, None)
