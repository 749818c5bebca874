"""What the tracker's calls of a simulated run cost a real Redis: seconds of its CPU for each simulated second.

    headrace simulate --preset large --record calls.gz
    headrace bench tracker_replay calls.gz

Every simulated node has a connection of its own to one server, and says what it said, when it said it. Claim: at most
half a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import redis
from benchmarks.measure import redis_cpu
from benchmarks.simulate import simulate
from benchmarks.simulator.case import PRESETS
from benchmarks.simulator.record import recorded
from support.redis_server import RedisServer

from headrace.cache.tracker.keys import Keys
from headrace.cache.tracker.packing import pack_request
from headrace.cache.tracker.protocol import Exchange, Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.scripts import script
from headrace.cache.tracker.settings import TrackerSettings

CLAIMED = 0.5
JOIN = 3600.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What it came to.

    Attributes:
        simulated: seconds of the recorded run that were replayed.
        server: seconds of the server's CPU for them.
        scripts: seconds of them within its scripts.
        memory: bytes that the server used more than before.
        calls, gained, wanted: what was said.
        late: seconds that a call was sent after its time, at most.
    """

    simulated: float
    server: float
    scripts: float
    memory: int
    calls: int
    gained: int
    wanted: int
    late: float

    @property
    def cores(self) -> float:
        return self.server / self.simulated if self.simulated else 0.0

    def __str__(self) -> str:
        said = max(1, self.calls)
        return (
            f"{self.calls} calls ({self.gained / said:.1f} gained, {self.wanted / said:.1f} wanted in each) "
            f"of {self.simulated:.1f} simulated seconds\n"
            f"  server    {self.server:.2f} s of CPU, {self.scripts:.2f} s of it in scripts: "
            f"{1e6 * self.server / said:.0f} us a call; {self.memory / 1e6:.1f} MB\n"
            f"  cores     {self.cores:.3f} (claim {CLAIMED}): {'met' if self.cores <= CLAIMED else 'NOT MET'}\n"
            f"  late      {self.late:.2f} s at most"
        )


def replay(path: Path, server: RedisServer, since: float, until: float) -> Replayed:
    """Say everything again that was said from `since` to `until`, when it was said; what was before is said first."""
    described, calls = recorded(path)
    swarm = Swarm("0" * 64, described["chunks"])
    settings = TrackerSettings(server.url, timeout=60.0)
    peers = []
    for number in range(described["nodes"]):
        zone = str(number % described["zones"]) if described["zones"] > 1 else ""
        peers.append(Peer(f"node-{number}", f"10.0.0.1:{number}", zone))
    asyncio.run(_join(settings, peers, swarm))
    client = redis.Redis(port=server.port, max_connections=len(peers) + 8)
    code, keys = script("exchange"), Keys(settings.prefix).swarm(swarm)
    client.script_load(code.text)
    connections = [client.connection_pool.make_connection() for _ in peers]
    asked = [False] * len(peers)
    try:
        said = gained = wanted = 0
        before, memory, last, began, late = 0.0, 0, since, None, 0.0
        for call in calls:
            if call.at > until:
                break
            if call.at >= since:
                if began is None:
                    client.config_resetstat()
                    before, memory = redis_cpu(client), client.info("memory")["used_memory"]
                    began = time.monotonic() - call.at
                ahead = call.at - (time.monotonic() - began)
                late = max(late, -ahead)
                if ahead > 0:
                    time.sleep(ahead)
                last = call.at
                said += 1
                gained += len(call.said.gained)
                wanted += len(call.said.wanted)
            connection = connections[call.node]
            if asked[call.node]:
                connection.read_response()
            packed = pack_request(
                call.said,
                [],
                renew=False,
                stamp=False,
                lease=settings.lease,
                lifetime=settings.lifetime,
                seed=said,
            )
            connection.send_command("EVALSHA", code.sha, len(keys), *keys, peers[call.node].id, *packed)
            asked[call.node] = True
        for connection, waits in zip(connections, asked, strict=True):
            if waits:
                connection.read_response()
        spent = redis_cpu(client) - before
        stats = client.info("commandstats")["cmdstat_evalsha"]
        grown = client.info("memory")["used_memory"] - memory
        return Replayed(last - since, spent, stats["usec"] / 1e6, grown, said, gained, wanted, late)
    finally:
        for connection in connections:
            connection.disconnect()
        client.close()


async def _join(settings: TrackerSettings, peers: list[Peer], swarm: Swarm) -> None:
    for number, peer in enumerate(peers):
        tracker = RedisTracker(settings, peer, seed=number)
        await tracker.register(peer, JOIN)
        await tracker.exchange(swarm, Exchange())
        await tracker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("calls", type=Path, nargs="?", help="what `headrace simulate --record` wrote")
    parser.add_argument("--until", type=float, default=float("inf"), help="simulated seconds to replay")
    parser.add_argument(
        "--since", type=float, default=0.0, help="measure from then on; the rest is said at once"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--smoke", action="store_true", help="of a small run that is simulated first")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.calls
        if args.smoke and path is None:
            path = Path(scratch) / "calls.gz"
            simulate(PRESETS["cluster"], path)
        if path is None or not path.exists():
            parser.error("name a file that `headrace simulate --record FILE` wrote.")
        server = RedisServer(scratch).start()
        try:
            found = replay(path, server, args.since, args.until)
        finally:
            server.stop()
    print(found)
    if args.json is not None:
        args.json.write_text(json.dumps({**asdict(found), "cores": found.cores}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
