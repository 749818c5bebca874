"""Loading while staging, with each read path: how long after the last chunk does `load` return?"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import interval
from benchmarks.models import write_model
from benchmarks.overlap import PREFIX, Case, once
from support.nginx import Nginx

ALLOWED = 0.3
PAIRS = 5
LARGEST = 1.5e9  # the disk has to take what the loopback can bring


def measure_staging(scratch: Path, size: int, pairs: int, smoke: bool) -> dict[str, Any]:
    """Every read path in turn, into fresh stores; prints a row for each."""
    paths: tuple[Any, ...] = ("auto", "mapped", "buffered", "direct")
    rounds = pairs or (1 if smoke else PAIRS)
    model = scratch / "served" / PREFIX
    actual = write_model(model, int(min(size, LARGEST)), hidden=512 if smoke else 2048)
    tails: dict[str, list[float]] = {path: [] for path in paths}
    staging: list[float] = []
    with Nginx(scratch / "served", scratch / "nginx") as server:
        for _ in range(rounds):
            for path in paths:
                case = Case(path, apart=False, limits="", read_path=path)
                outcome = once(case, f"{server.url}/{PREFIX}", model, scratch, actual)
                tails[path].append(outcome.tail)
                staging.append(outcome.staging)
    print(
        f"\nstaging: load while staging from loopback; {actual / 1e9:.2f} GB, the last chunk after "
        f"{statistics.median(staging):.2f} s, {rounds} rounds"
    )
    report: dict[str, Any] = {"bytes": actual, "paths": {}}
    for path, values in tails.items():
        found = interval(values)
        verdict = "met" if max(values) <= ALLOWED else "NOT MET"
        print(
            f"  {path:10} returned {found} s after the last chunk, at most {max(values):.3f} "
            f"(claim <= {ALLOWED}): {verdict}"
        )
        report["paths"][path] = {**found.as_dict(), "values": values, "verdict": verdict}
    return report
