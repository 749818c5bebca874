"""Model a cluster: the agents' own policy over simulated links; 10 to 10,000 nodes.

Claims: 1,000 nodes, 140 GB, 25 Gbit/s nodes, 100 Gbit/s origin (`--preset large`), cold: <= 1.01 models from the
origin, 99 % of the nodes within 1.5 x max(M/O, M/D, N*M/(O+N*U)), 0.8 f of the bytes in complete tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.simulator.case import GBIT, MIB, PRESETS, Case
from benchmarks.simulator.record import Recorder
from benchmarks.simulator.result import Result, draw
from benchmarks.simulator.world import World

from headrace.cache.errors import UsageError

GROWTH = (10, 30, 100, 300, 1000, 3000, 10000)
CHUNKS = 1_400_000
"""Chunks that all nodes of one run of `--growth` get together, at most: larger clusters have fewer, larger ones."""


def simulate(case: Case, record: Path | None = None) -> Result:
    """Run one case."""
    with ExitStack() as stack:
        said = stack.enter_context(Recorder(record, case)).said if record is not None else None
        started = time.process_time()
        world = World(case, said)
        world.run()
        return Result.of(world, time.process_time() - started)


def growth(case: Case, nodes: int) -> Case:
    """The same case with another number of nodes: where they have too many chunks together, with larger ones."""
    chunks = min(len(case.sizes()), CHUNKS // nodes)
    return replace(case, nodes=nodes, chunk=max(case.chunk, -(-case.model // chunks)))


def main() -> int:
    args = _arguments()
    try:
        case = _case(args)
    except UsageError as error:
        sys.stderr.write(f"headrace simulate: {error}\n")
        return error.exit_code
    if args.smoke:
        case = replace(case, nodes=min(case.nodes, 16), model=min(case.model, 64 * case.chunk))
    results: list[Result] = []
    for nodes in args.growth if args.growth is not None else [case.nodes]:
        one = growth(case, nodes) if args.growth is not None else case
        results.append(simulate(one, args.record))
        if not args.as_json:
            print(results[-1], flush=True)
    found: Any = [result.json() for result in results]
    found = found if args.growth is not None else found[0]
    if args.as_json is True:
        print(json.dumps(found))
    elif args.as_json:
        Path(args.as_json).write_text(json.dumps(found, indent=1) + "\n")
    if args.plot is not None:
        draw(results, args.plot)
    return 1 if any(result.unfinished for result in results) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace simulate", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="cluster", help="where to start from (cluster)")
    add("--nodes", type=int, help="that stage the model")
    add("--model", type=float, help="GB")
    add("--chunk", type=float, help="MiB of each chunk")
    add("--tensors", help="file with one tensor's bytes a line; a Llama of that size without it")
    add("--up", type=float, help="Gbit/s of each node")
    add("--down", type=float, help="Gbit/s of each node")
    add("--origin", type=float, help="Gbit/s, all together")
    add("--connection", type=float, help="MB/s that one connection to the origin gives")
    add("--slow", type=int, help="nodes that are slow")
    add("--slow-rate", type=float, help="Gbit/s of these, both ways")
    add("--zones", type=int, help="nodes are spread over so many")
    add("--zone-rate", type=float, help="Gbit/s into, and out of, each zone")
    add("--latency", type=float, help="round trip in a zone, in milliseconds")
    add("--tracker", type=float, help="round trip to the tracker, in milliseconds")
    add("--slots", type=int, help="uploads of a node at once")
    add("--join-over", type=float, help="nodes come evenly over so many seconds")
    add("--warm", type=float, help="share of the nodes that have the model")
    add("--deaths", type=int, help="nodes that die")
    add("--death-at", type=float, help="seconds until the first dies")
    add("--death-spread", type=float, help="seconds from the first death to the last")
    add("--seed", type=int, help="of everything that is left to chance")
    add("--links", choices=["shared", "queued"], help="how transfers pass links (shared up to 64 nodes)")
    add("--growth", type=int, nargs="*", help=f"run with so many nodes each ({' '.join(map(str, GROWTH))})")
    add("--plot", type=Path, help="write a picture there")
    add("--record", type=Path, help="write the tracker's calls there, for tracker_replay.py")
    add("--json", dest="as_json", nargs="?", const=True, metavar="FILE", help="figures as JSON")
    add("--smoke", action="store_true", help="small and quick")
    args = parser.parse_args()
    if args.growth == []:
        args.growth = list(GROWTH)
    return args


_UNITS = {
    "model": 1e9,
    "chunk": MIB,
    "up": GBIT,
    "down": GBIT,
    "origin": GBIT,
    "connection": 1e6,
    "slow_rate": GBIT,
    "zone_rate": GBIT,
    "latency": 1e-3,
    "tracker": 1e-3,
}
_WHOLE = {"model", "chunk"}


def _case(args: argparse.Namespace) -> Case:
    changed: dict[str, Any] = {}
    for name in {field.name for field in fields(Case)} & set(vars(args)):
        value = getattr(args, name)
        if value is not None:
            value = value * _UNITS[name] if name in _UNITS else value
            changed[name] = int(value) if name in _WHOLE else value
    if args.tensors is not None:
        changed["tensors"] = tuple(int(line) for line in Path(args.tensors).read_text().split())
        changed.setdefault("model", sum(changed["tensors"]))
    if args.links is not None:
        changed["exact"] = args.links == "shared"
    return replace(PRESETS[args.preset], **changed)


if __name__ == "__main__":
    sys.exit(main())
