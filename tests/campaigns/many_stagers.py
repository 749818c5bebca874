"""The long form of `crash/test_many_stagers.py`: stagers start, stop, go on and are killed at random, all at once.

Run by `make campaign`; `--smoke` does a few rounds, `--seed` chooses what happens. Prints one line, and
ends with an error at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from support.crashes import assert_nothing_wrong, many_small_files
from support.faulty_server import FaultyServer
from support.killing import CONNECTIONS, IN_FLIGHT
from support.models import CHUNK, below, published, small_model, visible
from support.processes import Launcher, Victim

MODEL = many_small_files(small_model(), 6)
MOST = 4


def one_round(launcher: Launcher, server: FaultyServer, root: Path, choose: random.Random) -> Counter[str]:
    """Things happen to a few stagers of one model; those that are left finish it."""
    done: Counter[str] = Counter()
    server.clear()

    def begin() -> Victim:
        return launcher.start(reference=f"{server.url}/model", root=root, connections=CONNECTIONS, span=CHUNK)

    running = [begin() for _ in range(choose.randint(2, MOST))]
    stopped: list[Victim] = []
    for _ in range(choose.randint(2, 6)):
        time.sleep(choose.uniform(0, 0.3))
        act = choose.choice(["kill", "kill", "stop", "go on", "start"])
        if act == "start" and len(running) + len(stopped) < MOST:
            running.append(begin())
        elif act == "kill" and len(running) > 1:
            done["ended before" if not running.pop(0).kill().killed else "killed"] += 1
            done["chunks compared"] += assert_nothing_wrong(root, MODEL)
        elif act == "stop" and len(running) > 1:
            stopped.append(running.pop(0))
            stopped[-1].signal(signal.SIGSTOP)
            done["stopped"] += 1
        elif act == "go on" and stopped:
            running.append(stopped.pop(0))
            running[-1].signal(signal.SIGCONT)
    for one in stopped:
        if choose.random() < 0.5:
            one.signal(signal.SIGCONT)
            running.append(one)
        else:
            done["killed while stopped" if one.kill().killed else "ended before"] += 1
    for one in running:
        ended = one.wait()
        assert ended.code == 0 and "error" not in ended.result, ended
        done["finished"] += 1
    assert visible(root) == MODEL
    counts = [server.multiplicity(f"model/{path}") for path in MODEL]
    assert all(sum(count.values()) == len(MODEL[path]) for path, count in zip(MODEL, counts, strict=True))
    again = sum((times - 1) * size for count in counts for times, size in count.items())
    # What a stopped one had in flight is still coming when it goes on: no pause is as long as its timeouts.
    disturbed = done["killed"] + done["killed while stopped"]
    assert again <= disturbed * IN_FLIGHT, f"{again} bytes were fetched again"
    done["bytes fetched again"] += again
    done["bytes in flight at most"] += disturbed * IN_FLIGHT
    shutil.rmtree(root)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    rounds = 4 if options.smoke else options.rounds
    choose, begun, done = random.Random(options.seed), time.monotonic(), Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="headrace-campaign-") as folder,
        Launcher() as launcher,
        FaultyServer(below("model", published(MODEL)), rate=3e6) as server,
    ):
        for number in range(rounds):
            done += one_round(launcher, server, Path(folder) / f"round-{number}", choose)
    what = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"several stagers: seed {options.seed}; {rounds} rounds: {what}; {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
