"""A cluster on one machine: what N cold nodes read from the origin, and when the last one is done.

Agents in network namespaces with shaped links, a real Redis, SeaweedFS with a counter in front of it. Side by
side in one run: the cluster, and the same agents when each reads the origin by itself. Then a node that joins
later, a new revision, and three topologies next to what the simulator says. Exit code 1 when a claim does not
hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.measure import end_cleanly, machine
from benchmarks.simulator.case import PRESETS
from benchmarks.simulator.world import World
from support import revisions
from support.cluster import MEMORY, Cluster, Member, Staged, ends
from support.namespaces import Network, Rate, missing
from support.origin import Origin
from support.revisions import Revision

from headrace.cache.publish import publish

MB, MIB, MBIT = 1e6, 1 << 20, 1e6 / 8
ORIGIN, NODE, SLOW = 800.0, 400.0, 50.0
"""Mbit/s."""
BODY_RATE = MBIT * 1448 / 1514
"""Bytes per second of bodies for each Mbit/s of a link, which also carries the headers of Ethernet, IP and TCP."""
AGE = "10m"
"""For so long nodes that join believe what the cluster found out about a reference."""
BODY, LAST, MOVED, AGREE = 1.02, 1.5, 0.07, 0.25
"""Claims: origin bytes per byte of the model, the last node's time per bound, bytes that a revision with 5 %
changed moves, and how far simulation and cluster may be apart."""


@dataclass(frozen=True, slots=True)
class Links:
    """Mbit/s of the origin, and of each node either way."""

    origin: float
    node: float
    slow: float

    def bound(self, size: int, nodes: int, slow: int = 0) -> float:
        """Seconds in which `nodes` can have `size` bytes at the earliest: max(M/O, M/D, N*M/(O+N*U))."""
        bits = size * 8 / 1e6
        up = (nodes - slow) * self.node + slow * self.slow
        return max(
            bits / self.origin, bits / (self.slow if slow else self.node), nodes * bits / (self.origin + up)
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A published revision: its folder, its reference at the origin, bytes of its files, its manifest's digest."""

    folder: Path
    reference: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Run:
    """One time that nodes staged the model at the same moment.

    Attributes:
        start: of the monotonic clock.
        seconds: of each node that has it, from the common start, in order.
        origin: body bytes that the origin sent.
        lists, heads: requests; `most_heads` for one file.
        cpu: share of the machine that was used, by whomever.
        agents: CPU seconds of the agents and what they started.
        failed: what nodes said that do not have it.
    """

    name: str
    start: float
    seconds: tuple[float, ...]
    origin: int
    lists: int
    heads: int
    most_heads: int
    cpu: float
    agents: float
    failed: tuple[str, ...] = ()

    @property
    def last(self) -> float:
        return max(self.seconds, default=float("nan"))


class Bench:
    """The network, the origin with the model, and where stores go."""

    def __init__(self, network: Network, origin: Origin, folder: Path, links: Links) -> None:
        self.network = network
        self.origin = origin
        self.links = links
        self._folder = folder
        self._number = 0

    @contextmanager
    def cluster(self, nodes: int, *, together: bool = True) -> Iterator[Cluster]:
        """Fresh agents with empty stores."""
        self._number += 1
        folder = self._folder / f"c{self._number}"
        rate = Rate(self.links.node, self.links.node)
        alone = None if together else {"peers": {"listen": ""}}
        with Cluster(
            self.network, self.origin, folder, rate=rate, tracker=together, settings=alone
        ) as cluster:
            yield cluster.start(nodes)
        shutil.rmtree(folder)

    def run(
        self,
        name: str,
        members: Sequence[Member],
        cluster: Cluster,
        model: Model,
        meanwhile: Callable[[], None] | None = None,
        **how: Any,
    ) -> tuple[Run, list[Staged]]:
        """Stage on all members from now on, and compare every byte."""
        self.origin.reads()
        spent = sum(_spent(member) for member in members)
        used, start = _cpu(), time.monotonic()
        futures = cluster.begin(model.reference, members, **how)
        if meanwhile is not None:
            meanwhile()
        found = ends(futures, patience=1200)
        share = _share(used, _cpu())
        reads = self.origin.reads()
        good = [one for one in found if one.report is not None]
        for one in good:
            one.check(model.folder)
        failed = tuple(f"{one.member.name}: {one.error or 'died'}" for one in found if one.report is None)
        seconds = tuple(sorted(one.at - start for one in good))
        heads = reads.by_path("HEAD")
        run = Run(
            name,
            start,
            seconds,
            reads.body(),
            reads.count("LIST"),
            reads.count("HEAD"),
            max(heads.values(), default=0),
            share,
            sum(_spent(member) for member in members) - spent,
            failed,
        )
        return run, found


def _cpu() -> tuple[float, float]:
    """Ticks that the machine's cores worked, and that there were."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _spent(member: Member) -> float:
    """CPU seconds of an agent and of its processes that have ended; 0 of one that is gone."""
    assert member.process is not None
    try:
        fields = Path(f"/proc/{member.process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[0] - before[0]) / max(1.0, after[1] - before[1])


@dataclass(slots=True)
class Verdicts:
    """Claims, and whether they held."""

    failed: int = 0

    def say(self, holds: bool, text: str) -> None:
        self.failed += not holds
        print(f"  {'met    ' if holds else 'NOT MET'}  {text}", flush=True)


def _row(run: Run, bound: float, size: int) -> str:
    half = statistics.median(run.seconds) if run.seconds else float("nan")
    return (
        f"{run.name:24}{len(run.seconds):>6}{half:>9.2f}{run.last:>9.2f}{run.last / bound:>8.2f}"
        f"{run.origin / size:>9.3f}{run.lists:>6}{run.heads:>6}{run.cpu:>7.0%}"
        f"{run.agents * 1e9 / (size * max(1, len(run.seconds))):>9.2f}"
    )


_HEADINGS = (
    f"{'':24}{'nodes':>6}{'median s':>9}{'last s':>9}{'/ bound':>8}{'origin':>9}{'LIST':>6}{'HEAD':>6}{'CPU':>7}"
    f"{'s/GB':>9}"
)  # fmt: skip


def cold(bench: Bench, model: Model, nodes: int, rounds: int, verdicts: Verdicts) -> dict[str, Any]:
    """All nodes from cold at the same moment, together and each by itself, in turn."""
    size = model.size
    bound = bench.links.bound(size, nodes)
    by_itself = nodes * size * 8e-6 / bench.links.origin
    print(
        f"\n{nodes} nodes from cold; bound {bound:.2f} s, if each reads the origin by itself {by_itself:.1f} s"
    )
    print(_HEADINGS)
    together: list[Run] = []
    alone: list[Run] = []
    for _ in range(rounds):
        for name, rows in (("cluster", together), ("each by itself", alone)):
            with bench.cluster(nodes, together=rows is together) as cluster:
                run, _ = bench.run(name, cluster.members, cluster, model)
            rows.append(run)
            print(_row(run, bound, size), *run.failed, flush=True)
    worst = max(run.origin for run in together) / size
    verdicts.say(worst <= BODY, f"the origin sent {worst:.4f} x the model at most (claim {BODY})")
    counts = max(run.lists for run in together), max(run.most_heads for run in together)
    verdicts.say(
        counts[0] <= 1 and counts[1] <= 1,
        f"{counts[0]} LIST, {counts[1]} HEAD per file, at most (claim 1, 1)",
    )
    last = statistics.median(run.last for run in together)
    verdicts.say(
        last <= LAST * bound, f"the last node: {last / bound:.2f} x the bound, median (claim {LAST})"
    )
    faster = [a.last / t.last for a, t in zip(alone, together, strict=True)]
    print(f"  each by itself takes {statistics.median(faster):.1f} x as long as the cluster")
    verdicts.say(not any(run.failed for run in (*together, *alone)), "every node has every byte")
    return {"bound": bound, "cluster": [asdict(r) for r in together], "alone": [asdict(r) for r in alone]}


def later(
    bench: Bench, model: Model, second: Model, changed: int, nodes: int, verdicts: Verdicts
) -> dict[str, Any]:
    """A node that joins later, and then a new revision: its first node, its second, one that has neither."""
    size = model.size
    print(f"\na node more than {nodes}, then a revision with {changed / size:.1%} of the bytes changed")
    print(f"{'':40}{'seconds':>9}{'origin MB':>11}{'peers MB':>10}{'moved':>8}")
    report: dict[str, Any] = {"changed": changed}

    def one(name: str, member: Member, cluster: Cluster, model: Model, age: str = AGE) -> tuple[float, float]:
        run, found = bench.run(name, [member], cluster, model, revalidate=age)
        sources = found[0].report.sources if found[0].report else {}
        moved = (run.origin + sources.get("peer", 0)) / size
        print(
            f"{name:40}{run.last:>9.2f}{run.origin / MB:>11.2f}{sources.get('peer', 0) / MB:>10.2f}{moved:>8.3f}",
            *run.failed,
            flush=True,
        )
        report[name] = {**asdict(run), "sources": sources}
        verdicts.failed += bool(run.failed)
        return run.origin, moved

    with bench.cluster(nodes) as cluster:
        bench.run("cold", cluster.members, cluster, model)
        (ninth,) = cluster.add()
        origin, _ = one("joins later", ninth, cluster, model)
        verdicts.say(origin == 0, f"it read {origin} bytes from the origin (claim 0)")
        (tenth,) = cluster.add()
        one("the same, asking the origin what is new", tenth, cluster, model, "always")
        first, other = cluster.members[:2]
        _, moved = one("the revision, its first node", first, cluster, second)
        verdicts.say(moved <= MOVED, f"it moved {moved:.4f} of the model (claim {MOVED})")
        origin, moved = one("the revision, its second node", other, cluster, second)
        verdicts.say(
            moved <= MOVED and origin == 0,
            f"it moved {moved:.4f}, {origin} bytes of it from the origin (claim {MOVED}, 0)",
        )
        (last,) = cluster.add()
        origin, _ = one("the revision, a node with nothing", last, cluster, second)
        verdicts.say(origin == 0, f"it read {origin} bytes from the origin: peers have it all (claim 0)")
    return report


def topologies(bench: Bench, model: Model, chunk: int, nodes: int, verdicts: Verdicts) -> dict[str, Any]:
    """Plain, with a death midway, with a slow node: next to the simulation of the same."""
    links, size = bench.links, model.size
    print("\nnext to the simulation; the last node that lives and is not slow; the slow one; the origin")
    print(f"{'':10}" + 2 * f"{'seconds':>11}{'simulated':>13}{'':>9}" + f"{'origin':>9}{'simulated':>11}")
    report: dict[str, Any] = {}
    half = links.bound(size, nodes) / 2
    for name in ("cluster", "death", "slow"):
        case = replace(
            PRESETS[name],
            nodes=nodes,
            model=size,
            chunk=chunk,
            up=links.node * BODY_RATE,
            down=links.node * BODY_RATE,
            slow_rate=links.slow * BODY_RATE,
            origin=links.origin * BODY_RATE,
            death_at=half,
        )
        with bench.cluster(nodes) as cluster:
            victim = cluster.members[-1]

            def die(victim: Member = victim) -> None:
                time.sleep(half)
                victim.crash()

            if name == "slow":
                bench.network.shape(victim.node, Rate(links.slow, links.slow))
            run, found = bench.run(name, cluster.members, cluster, model, die if name == "death" else None)
            bench.network.shape(victim.node, Rate(links.node, links.node))
        times = {one.member: one.at for one in found if one.report is not None}
        slow = times.pop(victim) - run.start if name == "slow" and victim in times else None
        last = max(times.values(), default=math.nan) - run.start
        world = World(case)
        world.run()
        finished = [node for node in world.nodes if node.finished < math.inf and not node.dead]
        simulated = max(node.finished for node in finished if not node.slow)
        pairs = [(last, simulated)]
        if slow is not None:
            pairs.append((slow, max(node.finished for node in finished if node.slow)))
        print(
            f"{name:10}"
            + "".join(f"{real:>11.2f}{model:>13.2f}{real / model - 1:>+9.0%}" for real, model in pairs)
            + " " * 33 * (2 - len(pairs))
            + f"{run.origin / size:>9.3f}{world.counts.origin / size:>11.3f}",
            *run.failed,
            flush=True,
        )
        apart = max(abs(real / model - 1) for real, model in pairs)
        verdicts.say(apart <= AGREE, f"{name}: {apart:.0%} apart (claim {AGREE:.0%})")
        report[name] = {**asdict(run), "pairs": pairs, "simulated_origin": world.counts.origin}
    return report


def _written(
    revision: Revision, folder: Path, chunk: int, origin: Origin, name: str, before: str | None
) -> Model:
    """Write, publish and upload a revision."""
    revision.write(folder)
    published = publish(folder, str(folder), chunk=chunk, predecessor=before)
    return Model(folder, origin.put(folder, name), published.bytes, published.digest)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="few nodes and a small model: does it work at all"
    )
    parser.add_argument("--nodes", type=int, default=0, help="that start together (default 8)")
    parser.add_argument("--rounds", type=int, default=0, help="of the comparison (default 3)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all rates, where the machine is the limit"
    )
    parser.add_argument("--only", choices=["cold", "later", "simulated"], help="one part")
    parser.add_argument(
        "--folder",
        default=MEMORY,
        help="where to write: by default memory, as one disk is not what eight nodes have (8 GB, and a short path)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    if reason := missing():
        print(f"skipped: {reason}")
        return 0
    smoke = options.smoke
    nodes, rounds = options.nodes or (3 if smoke else 8), options.rounds or (1 if smoke else 3)
    links = Links(*(rate * options.scale for rate in (ORIGIN, NODE, SLOW)))
    chunk = MIB // 4 if smoke else 4 * MIB
    base = revisions.transformer(
        **(
            {"hidden": 448, "inner": 2432, "vocab": 4096, "layers": 4}
            if smoke
            else {"hidden": 896, "inner": 4864, "vocab": 36352, "layers": 15}
        )
    )
    base = dataclasses.replace(base, shards=4)
    revision, changed = revisions.changed(base, 0.05, 1)
    end_cleanly()
    verdicts = Verdicts()
    report: dict[str, Any] = {"links": asdict(links), "nodes": nodes}
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-", dir=options.folder))
        )
        network = stack.enter_context(Network())
        rate = Rate(links.origin, links.origin)
        origin = stack.enter_context(Origin(network.add("origin", rate), folder / "origin"))
        first = _written(base, folder / "first", chunk, origin, "first", None)
        second = _written(revision, folder / "second", chunk, origin, "second", first.digest)
        bench = Bench(network, origin, folder, links)
        print(machine(folder))
        print(
            f"model: {first.size / MB:.1f} MB in chunks of {chunk / MIB:g} MiB; origin {links.origin:g} Mbit/s, nodes "
            f"{links.node:g} Mbit/s each way"
        )
        if options.only in (None, "cold"):
            report["cold"] = cold(bench, first, nodes, rounds, verdicts)
        if options.only in (None, "later"):
            report["later"] = later(bench, first, second, changed, nodes, verdicts)
        if options.only in (None, "simulated"):
            report["simulated"] = topologies(bench, first, chunk, nodes, verdicts)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1, default=str))
    # What a small model on few nodes shows is only that it works.
    return 1 if verdicts.failed and not smoke else 0


if __name__ == "__main__":
    sys.exit(main())
