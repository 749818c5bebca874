"""A real Redis, and a real Valkey, shared by tests that each use a prefix of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.redis_server import BINARY, RedisServer
from support.trackers import valkey_binary

from headrace.cache.tracker.settings import TrackerSettings

_serial = itertools.count()


@pytest.fixture(scope="session", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Each of the two."""
    binary = BINARY if request.param == "redis" else valkey_binary()
    if binary is None:
        pytest.skip(f"no {request.param}-server is installed")
    with RedisServer(tmp_path_factory.mktemp(request.param), binary=binary) as running:
        yield running


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Redis, where it does not matter which of the two it is."""
    if BINARY is None:
        pytest.skip("no redis-server is installed")
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may stop, kill and fill."""
    if BINARY is None:
        pytest.skip("no redis-server is installed")
    with RedisServer(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def settings(server: RedisServer) -> TrackerSettings:
    return TrackerSettings(server.url, prefix=f"test{next(_serial)}", timeout=200)


@pytest.fixture
def redis_settings(redis: RedisServer) -> TrackerSettings:
    return TrackerSettings(redis.url, prefix=f"test{next(_serial)}", timeout=200)
