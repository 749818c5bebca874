"""The long form of `crash/test_power_loss.py`: the power fails at random moments, on xfs and on ext4.

Run by `make campaign`, needs root; `--smoke` does a little, `--seed` chooses the moments. Prints one
line for each file system, and ends with an error at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from support.crashes import many_small_files
from support.faulty_server import FaultyServer
from support.loop import Losses, Outage, disk
from support.models import below, published, small_model
from support.processes import Launcher

MODEL = many_small_files(small_model(), 6)
AT_ONCE = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few clones of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clones", type=int, default=35, help="of each file system")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("power losses: not done, mounting needs root")
        return 0
    for kind in ("xfs", "ext4"):
        choose, losses, begun = random.Random(f"{options.seed}{kind}"), Losses(), time.monotonic()
        wanted = AT_ONCE if options.smoke else options.clones
        with tempfile.TemporaryDirectory(prefix="headrace-campaign-") as folder, Launcher() as launcher:
            while losses.clones < wanted:
                # Listed and published models by turns: only digests of our own to go by, or also the publisher's.
                files = MODEL if losses.clones // AT_ONCE % 2 else published(MODEL)
                with (
                    disk(kind, Path(folder)) as where,
                    FaultyServer(below("model", files), rate=3e6) as server,
                ):
                    outage = Outage(launcher, server, where, MODEL, Path(folder))
                    outage.lose_power(losses, choose, min(AT_ONCE, wanted - losses.clones))
        print(
            f"power lost ({kind}): seed {options.seed}; {losses}; {time.monotonic() - begun:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
