"""Staging against bare transfers of the same bytes from the same server to the same disk.

Pairs of headrace and bare obstore ranges (16 MiB, 8 at once, into fresh preallocated files) alternate in
one run; what is reported is the median of the paired ratios and of the paired differences in CPU seconds
per GB, with a bootstrap interval. Claims: at least 0.9 x the throughput, at most 0.10 CPU s/GB more,
hashing, listing and linking included, before and after the sync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.clients import Result, Task, run
from benchmarks.measure import GB, Cost, Interval, end_cleanly, interval, machine, tree_cpu
from benchmarks.models import write_model
from support.nginx import Nginx
from support.seaweedfs import SeaweedFS

PREFIX = "model"
BUCKET = "models"
FASTER, DEARER = 0.9, 0.10


@dataclass
class Row:
    """The repetitions of one client: its results, and the server's CPU seconds for each."""

    results: list[Result] = field(default_factory=list)
    server: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """One server with the model behind it."""

    name: str
    task: Task
    pid: int
    scratch: Path

    @property
    def size(self) -> int:
        return sum(size for _, size in self.task.files)

    def once(self, client: str, rows: dict[str, Row], workers: int = 0) -> None:
        """One repetition, into a fresh folder that is gone afterwards."""
        target = self.scratch / "target"
        os.sync()
        before = tree_cpu(self.pid)
        result = run(replace(self.task, client=client, target=str(target), workers=workers))
        row = rows.setdefault(client, Row())
        row.results.append(result)
        row.server.append(tree_cpu(self.pid) - before)
        shutil.rmtree(target)


def _rate(cost: Cost, size: int) -> float:
    return size / GB / cost.wall


@dataclass(frozen=True, slots=True)
class Paired:
    """headrace next to bare: throughput ratio, and CPU s/GB more: client, its user share, with the server."""

    ratio: Interval
    cpu: Interval
    user: Interval
    both: Interval

    @property
    def met(self) -> bool:
        return self.ratio.median >= FASTER and self.cpu.median <= DEARER


def _paired(rows: dict[str, Row], size: int, moment: Callable[[Result], Cost]) -> Paired:
    ours, bare = rows["headrace"], rows["bare"]
    pairs = [(moment(a), moment(b)) for a, b in zip(ours.results, bare.results, strict=True)]
    cpu = [(a.cpu - b.cpu) * GB / size for a, b in pairs]
    servers = zip(ours.server, bare.server, strict=True)
    return Paired(
        interval([b.wall / a.wall for a, b in pairs]),
        interval(cpu),
        interval([(a.user - b.user) * GB / size for a, b in pairs]),
        interval([c + (s - t) * GB / size for c, (s, t) in zip(cpu, servers, strict=True)]),
    )


def compare(bench: Bench, pairs: int, others: Sequence[str], rounds: int) -> dict[str, Any]:
    """Alternate headrace and bare, and the other clients in between; print and return the figures."""
    rows: dict[str, Row] = {}
    for client in ("bare", "headrace"):
        bench.once(client, {})  # the first repetition of each is dropped
    for number in range(pairs):
        for client in ("bare", "headrace") if number % 2 else ("headrace", "bare"):
            bench.once(client, rows)
        if number < rounds:
            for client in others:
                bench.once(client, rows)
    print(f"\n{bench.name}: {bench.size / GB:.2f} GB, {pairs} pairs")
    print(f"{'client':10} {'GB/s':>22} {'synced':>22} {'CPU s/GB':>22} {'synced':>22} {'server':>7}")
    report: dict[str, Any] = {"bytes": bench.size, "clients": {}}
    for client, row in rows.items():
        figures = [
            interval([_rate(r.written, bench.size) for r in row.results]),
            interval([_rate(r.synced, bench.size) for r in row.results]),
            interval([r.written.cpu * GB / bench.size for r in row.results]),
            interval([r.synced.cpu * GB / bench.size for r in row.results]),
        ]
        server = interval([s * GB / bench.size for s in row.server])
        print(f"{client:10} " + " ".join(f"{f!s:>22}" for f in figures) + f" {server.median:7.3f}")
        keys = ("rate", "rate_synced", "cpu", "cpu_synced")
        report["clients"][client] = {k: f.as_dict() for k, f in zip(keys, figures, strict=True)}
    for moment, pick in (("before sync", _written), ("after sync", _synced)):
        paired = _paired(rows, bench.size, pick)
        print(
            f"{moment}: headrace / bare throughput {paired.ratio} (claim >= {FASTER}); CPU s/GB more: {paired.cpu} "
            f"(claim <= {DEARER:.2f}), of it user {paired.user}, with the server's {paired.both}: "
            f"{'met' if paired.met else 'NOT MET'}"
        )
        report[moment] = {
            "ratio": paired.ratio.as_dict(),
            "cpu": paired.cpu.as_dict(),
            "user": paired.user.as_dict(),
            "both": paired.both.as_dict(),
            "met": paired.met,
        }
    return report


def _written(result: Result) -> Cost:
    return result.written


def _synced(result: Result) -> Cost:
    return result.synced


def scaling(bench: Bench, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Worker processes against a server that throttles each connection."""
    print(f"\n{bench.name}: {bench.size / GB:.2f} GB by worker processes")
    report = {}
    for count in counts:
        rows: dict[str, Row] = {}
        for _ in range(rounds):
            bench.once("headrace", rows, workers=count)
        rates = interval([_rate(r.synced, bench.size) for r in rows["headrace"].results])
        print(f"  {count} workers: {rates} GB/s")
        report[str(count)] = rates.as_dict()
    return report


def _upload(server: SeaweedFS, model: Path) -> None:
    client = server.client()
    try:
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(model.iterdir()):
            client.upload_file(str(path), BUCKET, f"{PREFIX}/{path.name}")
    finally:
        client.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a small model and few pairs: does it work at all"
    )
    parser.add_argument("--pairs", type=int, default=0, help="pairs for each server")
    parser.add_argument("--size", type=float, default=2.0, help="GiB of the model")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--only", choices=["nginx", "seaweedfs", "scaling"], help="one part")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    size = int((0.125 if options.smoke else options.size) * (1 << 30))
    pairs = options.pairs or (2 if options.smoke else 15)
    others_rounds = 1 if options.smoke else min(3, pairs)
    report: dict[str, Any] = {}
    end_cleanly()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        model = scratch / "served" / PREFIX
        hidden = 1024 if options.smoke else 2048
        write_model(model, size, hidden=hidden)
        print(machine(scratch))
        files = tuple((p.name, p.stat().st_size) for p in sorted(model.iterdir()))
        empty = Task("", "", "", PREFIX, files, "")
        if options.only in (None, "nginx"):
            with Nginx(scratch / "served", scratch / "nginx") as server:
                bench = Bench("nginx", replace(empty, url=server.url), server.pid, scratch)
                report["nginx"] = compare(bench, pairs, (), 0)
        if options.only in (None, "seaweedfs"):
            with SeaweedFS(scratch / "weed") as weed:
                _upload(weed, model)
                task = replace(empty, url=weed.url, bucket=BUCKET, environ=weed.environ)
                bench = Bench("SeaweedFS", task, os.getpid(), scratch)
                report["seaweedfs"] = compare(bench, pairs, ("boto3", "s3fs", "rclone"), others_rounds)
            shutil.rmtree(scratch / "weed")
        if options.only in (None, "scaling"):
            # Few connections to each worker: a chunk at this rate takes a second, and the last ones count.
            limit = "limit_rate 16m;"
            with Nginx(scratch / "served", scratch / "nginx", extra=limit) as server:
                task = replace(empty, url=server.url, connections=4)
                bench = Bench(f"nginx with {limit} 4 connections a worker", task, server.pid, scratch)
                report["scaling"] = scaling(bench, (1, 2, 4), 1 if options.smoke else 3)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
