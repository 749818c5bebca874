"""Several processes of one node: how often does the model come off the disk, and what does sharing cost?

Claim: with two and with four ranks at most 1.02 x the model is read from the block device, cold, whichever way
the bytes are handed over. Beside it the seconds until all ranks have everything and the CPU time of all of them,
also of ranks that know nothing of each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.measure import GB, end_cleanly, machine
from benchmarks.models import write_model
from support.ranks import Ended, Team

MOST = 1.02
WAYS: dict[str, dict[str, Any]] = {
    "page cache, mapped": {"read_path": "auto"},
    "page cache, private memory": {"read_path": "buffered"},
    "broadcast of direct reads": {"read_path": "direct"},
    "each alone, direct": {"read_path": "direct", "alone": True},
}


def make_cold(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def load_once(team: Team, folder: Path, scratch: Path, ranks: int, task: dict[str, Any]) -> list[Ended]:
    make_cold(folder)
    ended = team.load(scratch / "store", folder, ranks, **task)
    for one in ended:
        if one.code or "error" in one.said:
            raise SystemExit(f"a rank failed: {one.message or one.code}")
    return ended


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1.0, help="of the model, in GB")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each way, alternating")
    parser.add_argument("--folder", type=Path, help="where the model is written; by default a temporary one")
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it work at all")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.rounds = 0.1, 1
    end_cleanly()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, Team() as team:
        folder = Path(scratch) / "model"
        write_model(folder, int(options.size * GB))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(machine(scratch))
        rows: list[dict[str, Any]] = []
        digests: set[str] = set()
        for ranks in (2, 4):
            taken: dict[str, list[list[Ended]]] = {way: [] for way in WAYS}
            for turn in range(options.rounds + 1):
                for way, task in WAYS.items():
                    ended = load_once(team, folder, Path(scratch), ranks, task)
                    digests.update(one.said["digest"] for one in ended)
                    if len(digests) != 1:  # also of ranks that each load alone
                        raise SystemExit(f"the {ranks} ranks have different tensors: {way}")
                    if turn:  # the first brings the libraries' code in
                        taken[way].append(ended)
            rows += [row(way, ranks, runs, size) for way, runs in taken.items()]
    print(f"{'way':28} ranks  disk/model  seconds  CPU s/GB of the model")
    for one in rows:
        print(
            f"{one['way']:28} {one['ranks']:5}  {one['disk']:10.4f}  {one['seconds']:7.2f}  {one['cpu']:8.2f}"
        )
    good = all(one["disk"] <= MOST for one in rows if not one["alone"])
    print(f"claim: at most {MOST} x the model off the disk: {'holds' if good else 'DOES NOT HOLD'}")
    if options.json:
        options.json.write_text(json.dumps({"size": size, "rows": rows, "holds": good}, indent=1))
    return 0 if good else 1


def row(way: str, ranks: int, runs: list[list[Ended]], size: int) -> dict[str, Any]:
    """Of the repetitions: most disk bytes, medians of the rest."""
    return {
        "way": way,
        "ranks": ranks,
        "alone": bool(WAYS[way].get("alone")),
        "disk": max(sum(one.said["disk"] for one in ended) for ended in runs) / size,
        "seconds": statistics.median(max(one.said["seconds"] for one in ended) for ended in runs),
        "cpu": statistics.median(sum(one.said["cpu"] for one in ended) for ended in runs) / (size / GB),
    }


if __name__ == "__main__":
    raise SystemExit(main())
