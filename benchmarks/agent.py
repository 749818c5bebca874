"""What the agent costs a node that asks nothing of it: its start, its memory, its processor time.

The start is from the command until its socket takes connections; memory the summed PSS of all its processes;
idle time what they used of one core meanwhile, before and after a model was staged through it. Claims: a start in
less than a second without torch, less than 120 MB, about nothing (at most 0.5 % of a core) when idle. `alone` has
no other nodes; `cluster` serves others and says every five seconds to a real Redis that it lives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.measure import machine, tree_cpu
from support.redis_server import RedisServer

from headrace.prefetch.client import AgentClient

START_SECONDS, PSS_BYTES, IDLE_CORES = 1.0, 120e6, 0.005


class Running:
    """One agent with a store of its own below `folder`."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.socket = str(folder / "agent.sock")
        config = folder / "agent.toml"
        config.write_text(
            f'root = "{folder / "store"}"\n[agent]\nsocket = "{self.socket}"\n'
            f'volumes = "{folder / "volumes"}"\nmetrics = "127.0.0.1:0"\nlog_level = "warning"\n{more}'
        )
        self.client = AgentClient(self.socket)
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli.main", "agent", "--config", str(config)]
        )
        while not self.client.there:
            if self.process.poll() is not None:
                raise SystemExit("the agent did not start")
            time.sleep(0.002)
        self.start_seconds = time.perf_counter() - begun

    def processes(self) -> list[int]:
        found, pending = [], [self.process.pid]
        while pending:
            pid = pending.pop()
            found.append(pid)
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                pending += [int(child) for child in path.read_text().split()]
        return found

    def pss(self) -> int:
        """Bytes, of all its processes."""
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def idle(self, seconds: float) -> float:
        """Cores in use while nothing is asked."""
        before = tree_cpu(self.process.pid)
        time.sleep(seconds)
        return (tree_cpu(self.process.pid) - before) / seconds

    def stage(self, model: Path) -> None:
        for said in self.client.stream("POST", "/v1/stage", {"request": {"reference": str(model)}}):
            if "error" in said:
                raise SystemExit(said["error"]["message"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def run(folder: Path, starts: int, idle_seconds: float, more: str) -> dict[str, Any]:
    """One configuration: started some times, then idle, staged through, idle again."""
    times = []
    for _ in range(starts - 1):
        agent = Running(folder, more)
        times.append(agent.start_seconds)
        agent.stop()
    agent = Running(folder, more)
    times.append(agent.start_seconds)
    fresh, idle_fresh = agent.pss(), agent.idle(idle_seconds)
    model = folder / "model"
    model.mkdir()
    (model / "weights.bin").write_bytes(os.urandom(64 << 20))
    agent.stage(model)
    time.sleep(1.0)
    after, idle_after = agent.pss(), agent.idle(idle_seconds)
    agent.stop()
    return {
        "start_seconds": statistics.median(times),
        "starts": times,
        "pss": fresh,
        "pss_after_staging": after,
        "idle_cores": idle_fresh,
        "idle_cores_after_staging": idle_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--idle", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it work at all")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    starts, idle = (2, 1.0) if options.smoke else (options.starts, options.idle)
    results = {}
    with (
        tempfile.TemporaryDirectory(prefix="headrace-agent-") as top,
        RedisServer(Path(top) / "redis") as redis,
    ):
        serving = '[peers]\nlisten = "127.0.0.1:0"\n'
        for name, more in (("alone", ""), ("cluster", f'{serving}[tracker]\nurl = "{redis.url}"\n')):
            folder = Path(top) / name
            folder.mkdir()
            results[name] = run(folder, starts, idle, more)
    print(machine())
    print(f"{'':8}  {'start s':>8} {'PSS MB':>8} {'after':>8} {'idle cores':>11} {'after':>8}")
    for name, found in results.items():
        print(
            f"{name:8}  {found['start_seconds']:8.2f} {found['pss'] / 1e6:8.1f} "
            f"{found['pss_after_staging'] / 1e6:8.1f} {found['idle_cores']:11.4f} "
            f"{found['idle_cores_after_staging']:8.4f}"
        )
    good = all(
        found["start_seconds"] < START_SECONDS
        and max(found["pss"], found["pss_after_staging"]) < PSS_BYTES
        and max(found["idle_cores"], found["idle_cores_after_staging"]) <= IDLE_CORES
        for found in results.values()
    )
    print("claims hold" if good else "claims do not hold here")
    if options.json:
        Path(options.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
