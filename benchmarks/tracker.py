"""What the tracker costs the Redis or Valkey that nodes share, call by call.

A swarm of 1,000 nodes and 8,345 chunks (140 GB in 16 MiB chunks) is written into a real server, of which each chunk
is held by a given share of the nodes; then nodes say and ask. `script` is what the server says that its scripts took
per call, `server` the processor time of its whole process (network included), both the least of several rounds: the
machine does other things, too. Exchanges come from many connections, as to a busy server; the other calls one by one,
to one that rests between them. Claim: 32 chunks gained and 32 wanted take at most 100 us of script in Redis, whoever
holds what. The tracker in memory, which simulations use, is measured beside it: at most 10 us per wanted chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import redis
from benchmarks.measure import machine, redis_cpu
from support.redis_server import BINARY, RedisServer
from support.trackers import valkey_binary

from headrace.cache.tracker.keys import Keys
from headrace.cache.tracker.memory import MemorySwarms
from headrace.cache.tracker.packing import pack_request
from headrace.cache.tracker.protocol import Exchange, Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.scripts import script
from headrace.cache.tracker.settings import TrackerSettings

BATCH = 32
WINDOW = 417  # 5 % of the chunks
CONNECTIONS = 50
CLAIMED, WANTED_IN_MEMORY = 100.0, 10.0
DENSITIES = (0.0, 0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of call; microseconds per call, and what is claimed of `script`."""

    server: str
    call: str
    calls: int
    script: float
    process: float
    claim: float | None = None

    @property
    def holds(self) -> bool:
        return self.claim is None or self.script <= self.claim


def show(row: Row) -> None:
    bound = "" if row.claim is None else f"{row.claim:8.0f}{'' if row.holds else '  exceeded'}"
    print(f"{row.server:8}{row.call:44}{row.calls:6}{row.script:10.1f}{row.process:10.1f}{bound}", flush=True)


class Bench:
    """Nodes of one swarm at one server."""

    def __init__(self, server: RedisServer, name: str, nodes: int, chunks: int, rounds: int) -> None:
        self.name, self.rounds = name, rounds
        self.swarm = Swarm("0" * 64, chunks)
        self.settings = TrackerSettings(server.url, timeout=60)
        self.peers = [
            Peer(f"node-{i:04}-0123456789ab", f"10.0.{i // 250}.{i % 250}:9000") for i in range(nodes)
        ]
        self.client: Any = redis.Redis(port=server.port)
        self.rows_key = Keys(self.settings.prefix).swarm(self.swarm)[0]
        self.random = random.Random(1)
        self.connections = [self.client.connection_pool.make_connection() for _ in range(CONNECTIONS)]

    def close(self) -> None:
        for connection in self.connections:
            connection.disconnect()
        self.client.close()

    async def measure(self, calls: int) -> list[Row]:
        """Every kind of call, `calls` times a round."""
        found: list[Row] = []
        trackers = [RedisTracker(self.settings, peer, seed=i) for i, peer in enumerate(self.peers)]
        try:
            joins = (one.exchange(self.swarm, Exchange()) for one in trackers)
            found.append(await self._timed("join", [*joins], rounds=1))
            asking = trackers[:8]
            for density in DENSITIES:
                self.fill(density)
                name = f"gained {BATCH}, wanted {BATCH}: held by {density:.0%}"
                found.append(self._exchanges(name, calls))
            have = bytes([255] * (self.swarm.chunks // 8)) + bytes(1) * (self.swarm.chunks % 8 > 0)
            found.append(
                await self._timed("announce all", lambda: (t.announce(self.swarm, have) for t in asking[:4]))
            )
            found.append(
                await self._timed("heartbeat", lambda: (t.register(t._me, 60) for t in trackers[:100]))
            )
            found.append(await self._timed("clear one node", [trackers[-1].leave(self.swarm)], rounds=1))
        finally:
            for one in trackers:
                await one.close()
        return found

    def fill(self, density: float) -> None:
        """Each chunk is held by this share of the nodes, at random."""
        stride = 64
        while stride < len(self.peers):
            stride *= 2
        pool = []
        for _ in range(100):
            row = 0
            for column in self.random.sample(range(len(self.peers)), round(density * len(self.peers))):
                row |= 1 << (stride - 1 - column)
            pool.append(row.to_bytes(stride // 8, "big"))
        whole = b"".join(self.random.choices(pool, k=self.swarm.chunks))
        self.client.set(self.rows_key, whole)

    def memory(self) -> dict[str, int]:
        """Bytes by the last word of the key."""
        found: dict[str, int] = {}
        for key in self.client.scan_iter(match=f"{self.settings.prefix}*"):
            name = key.decode().rpartition("}:")[2] if b"}" in key else key.decode().split(":")[1]
            found[name] = found.get(name, 0) + self.client.memory_usage(key, samples=0)
        return found

    async def _timed(
        self,
        name: str,
        calls: Callable[[], Iterable[Awaitable[Any]]] | Sequence[Awaitable[Any]],
        *,
        rounds: int = 0,
    ) -> Row:
        best: tuple[float, float, int] | None = None
        for _ in range(rounds or self.rounds):
            todo = list(calls() if callable(calls) else calls)
            before = redis_cpu(self.client)
            self.client.config_resetstat()
            for call in todo:
                await call
            stats = self.client.info("commandstats")
            scripts = [stats[key]["usec"] for key in ("cmdstat_evalsha", "cmdstat_eval") if key in stats]
            one = (sum(scripts) / len(todo), (redis_cpu(self.client) - before) * 1e6 / len(todo), len(todo))
            best = one if best is None else (min(best[0], one[0]), min(best[1], one[1]), one[2])
        assert best is not None
        row = Row(self.name, name, best[2], best[0], best[1])
        show(row)
        return row

    def _exchanges(self, name: str, calls: int) -> Row:
        """Exchanges as a busy server gets them: from many connections, each with one request under way."""
        code, keys = script("exchange"), Keys(self.settings.prefix).swarm(self.swarm)
        self.client.script_load(code.text)
        connections = self.connections
        best = (float("inf"), float("inf"))
        for _ in range(self.rounds):
            requests = []
            for i in range(calls):
                window = self.random.randrange(max(1, self.swarm.chunks - WINDOW))
                some = self.random.sample(range(window, min(window + WINDOW, self.swarm.chunks)), 2 * BATCH)
                request = Exchange(gained=some[:BATCH], wanted=some[BATCH:], claims=2)
                packed = pack_request(request, [], renew=False, stamp=False, lease=10, lifetime=3600, seed=i)
                me = self.peers[self.random.randrange(len(self.peers))].id
                requests.append(("EVALSHA", code.sha, len(keys), *keys, me, *packed))
            encoded = [connections[0].pack_command(*request) for request in requests]
            before = redis_cpu(self.client)
            self.client.config_resetstat()
            for at in range(0, calls, CONNECTIONS):
                batch = list(zip(connections, encoded[at : at + CONNECTIONS], strict=False))
                for connection, request_bytes in batch:
                    connection.send_packed_command(request_bytes)
                for connection, _ in batch:
                    connection.read_response()
            stats = self.client.info("commandstats")["cmdstat_evalsha"]
            best = (
                min(best[0], stats["usec"] / calls),
                min(best[1], (redis_cpu(self.client) - before) * 1e6 / calls),
            )
        row = Row(self.name, name, calls, *best, CLAIMED if self.name == "redis" else None)
        show(row)
        return row


def in_memory(nodes: int, chunks: int, calls: int) -> Row:
    """The tracker that simulations use: microseconds per wanted chunk, one gained beside each."""
    chance, swarm, best = random.Random(1), Swarm("s", chunks), float("inf")
    swarms = MemorySwarms()
    peers = [Peer(f"n{i}", "host:1", f"z{i % 4}") for i in range(nodes)]
    for peer in peers:
        have = chance.getrandbits(chunks) & chance.getrandbits(chunks)
        swarms.announce(peer, swarm, have.to_bytes((chunks + 7) // 8, "little"), 0.0)
    for _ in range(5):
        requests = [chance.sample(range(chunks), 2 * BATCH) for _ in range(calls)]
        begun = time.perf_counter()
        for i, some in enumerate(requests):
            request = Exchange(gained=some[:BATCH], wanted=some[BATCH:], claims=2)
            swarms.exchange(peers[i % nodes], swarm, request, 1.0)
        best = min(best, (time.perf_counter() - begun) / calls / BATCH * 1e6)
    row = Row(
        "memory", "per wanted chunk, one gained beside each", calls * BATCH, best, best, WANTED_IN_MEMORY
    )
    show(row)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="100 nodes, few calls; nothing is claimed")
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    nodes = options.nodes or (100 if options.smoke else 1000)
    chunks = options.chunks or (1000 if options.smoke else 8345)
    calls, rounds = (50, 1) if options.smoke else (1000, 7)
    print(machine())
    print(f"{nodes} nodes, {chunks} chunks\n")
    print(f"{'server':8}{'call':44}{'calls':>6}{'script us':>10}{'server us':>10}{'claim':>8}")
    rows: list[Row] = []
    memory = {}
    for name, binary in (("redis", BINARY), ("valkey", valkey_binary())):
        if binary is None:
            print(f"{name}: not installed, left out")
            continue
        with tempfile.TemporaryDirectory() as folder, RedisServer(folder, binary=binary) as server:
            bench = Bench(server, name, nodes, chunks, rounds)
            rows += asyncio.run(bench.measure(calls))
            memory[name] = bench.memory()
            bench.close()
    rows.append(in_memory(nodes, chunks, calls))
    print("\nbytes in the server: " + json.dumps(memory))
    if options.json:
        Path(options.json).write_text(
            json.dumps({"calls": [asdict(row) for row in rows], "memory": memory}, indent=1)
        )
    return 0 if options.smoke or all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
