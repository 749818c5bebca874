"""The long form of `crash/test_kill.py`: hundreds of kills at random moments, one at every line, repairs too.

Run by `make campaign`; `--smoke` does a little of each, `--seed` chooses the moments. Prints one line
for each part, and ends with an error at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.crashes import many_small_files, phase
from support.faulty_server import FaultyServer
from support.killing import Round, Scene, Tally, random_kills
from support.models import PATIENT, below, grid_of, published, small_model, stage_small, visible
from support.processes import Launcher
from support.stores import flip, opened

from headrace.cache.repair import repair
from headrace.cache.verify import verify

MODEL = many_small_files(small_model(), 12)
SHARD = "model-00001-of-00002.safetensors"
STAGING = ["chunkmap", "durable", "learned", "object", "prepare", "reuse", "snapshot", "stager", "store"]
REPAIR = ["clone", "durable", "learned", "object", "repair", "salvage", "snapshot", "store"]


def say(name: str, seed: int, tally: Tally, begun: float) -> None:
    print(f"{name}: seed {seed}; {tally}; {time.monotonic() - begun:.0f} s", flush=True)


def at_random(launcher: Launcher, root: Path, seed: int, kills: int) -> None:
    for how, workers, share in (("published", 1, 0.5), ("listed", 1, 0.35), ("published", 2, 0.15)):
        begun, tally = time.monotonic(), Tally()
        files = published(MODEL) if how == "published" else MODEL
        with FaultyServer(below("model", files), rate=4e6 if workers == 1 else 1.5e6) as server:
            scene = Scene(launcher, server, MODEL, root)
            random_kills(
                scene, tally, seed, round(kills * share), published=how == "published", workers=workers
            )
        say(f"killed at random moments ({how}, {workers} processes)", seed, tally, begun)


def at_every_line(launcher: Launcher, root: Path, seed: int, most: int) -> None:
    """Once just before each line of the modules that write the store, at one of the times it runs."""
    choose = random.Random(seed)
    small = many_small_files(small_model(tensors=3), 2)
    for how in ("published", "listed"):
        begun, tally = time.monotonic(), Tally()
        files = published(small) if how == "published" else small
        with FaultyServer(below("model", files)) as server:
            scene = Scene(launcher, server, small, root)
            lines = scene.start(root / "counted", count_lines=STAGING).wait().result["lines"]
            shutil.rmtree(root / "counted")
            for number, (module, line, times) in enumerate(choose.sample(lines, min(most, len(lines)))):
                one = Round(scene, tally, f"line-{number}", published=how == "published")
                one.die(die_at_line=[module, line, choose.randint(1, times)])
                one.finish()
        say(f"killed at lines ({how})", seed, tally, begun)


def repairs(launcher: Launcher, root: Path, seed: int, most: int) -> None:
    """Two snapshots that show one bad inode; the repair is killed at each of its lines."""
    choose, begun, tally = random.Random(seed), time.monotonic(), Tally()
    small = small_model(tensors=3)
    grid = grid_of(SHARD, small[SHARD])
    with FaultyServer({**below("one", small), **below("two", small)}) as server:
        saved, store = root / "saved", root / "store"
        snapshots = [stage_small(f"{server.url}/{name}", saved).snapshot for name in ("one", "two")]
        with opened(saved, snapshots[0]) as it:
            for index in (1, 3):
                flip(it.data_of(SHARD), grid.offsets[index] + 3)
            damaged = it.data_of(SHARD).read_bytes()

        def restored() -> None:
            shutil.rmtree(store, ignore_errors=True)
            # Hard links and all.
            subprocess.run(["cp", "-a", str(saved), str(store)], check=True)

        restored()
        counted = launcher.start("repair", root=store, snapshot=snapshots[0], count_lines=REPAIR).wait()
        lines = counted.result["lines"]
        for module, line, times in choose.sample(lines, min(most, len(lines))):
            restored()
            task = {"snapshot": snapshots[0], "die_at_line": [module, line, choose.randint(1, times)]}
            tally.rounds += 1
            if launcher.start("repair", root=store, **task).wait().killed:
                tally.kills += 1
            shown = set()
            for snapshot in snapshots:
                with opened(store, snapshot) as it:
                    for path, data in small.items():
                        bytes_now = it.link(path).read_bytes()
                        assert bytes_now == data or (path == SHARD and bytes_now == damaged)
                        shown.add("old bytes" if bytes_now != data else path)
                        tally.checked += len(it.snapshot.manifest().by_path[path].grid)
            tally.phases["not shown yet" if "old bytes" in shown else "shown"] += 1
            for snapshot in snapshots:
                with opened(store, snapshot) as it:
                    repair(it.store, it.domain, it.snapshot, options=PATIENT)
                    assert verify(it.store, it.domain, it.snapshot).ok
            assert visible(store) == small
            assert phase(store, len(small)) == "linked"
        shutil.rmtree(store)
        shutil.rmtree(saved)
    say("repairs killed at lines", seed, tally, begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a little of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=240, help="at random moments")
    parser.add_argument("--lines", type=int, default=10_000, help="at most so many lines of each part")
    options = parser.parse_args()
    kills, lines = (10, 10) if options.smoke else (options.kills, options.lines)
    with tempfile.TemporaryDirectory(prefix="headrace-campaign-") as folder, Launcher() as launcher:
        at_random(launcher, Path(folder), options.seed, kills)
        at_every_line(launcher, Path(folder), options.seed, lines)
        repairs(launcher, Path(folder), options.seed, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
