"""The long form of `cluster/test_faults.py`: random faults at random moments strike random nodes, hundreds of times.

Run by `make campaign`; `--smoke` does a few, `--seed` chooses faults, moments and nodes. Prints one line for each kind
of fault, and ends with an error at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict

from support import bed as beds
from support.faults import FAULTS, suffer


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="each fault once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="how often each fault strikes")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--only", help="a part of a fault's name")
    options = parser.parse_args()
    if reason := beds.missing():
        print(f"skipped: {reason}")
        return 0
    faults = [fault for fault in FAULTS if options.only is None or options.only in fault.name]
    choose = random.Random(options.seed)
    origin: dict[str, list[float]] = defaultdict(list)
    begun, early = time.monotonic(), 0
    with beds.bed() as bed:
        for number in range(1 if options.smoke else options.rounds):
            for fault in faults:
                at, victim = choose.random(), choose.randrange(options.nodes)
                try:
                    with bed.cluster(options.nodes) as cluster:
                        ended = suffer(bed, cluster, fault, cluster.members[victim], at)
                except AssertionError:
                    print(
                        f"round {number}: {fault.name}, node {victim}, at {at:.3f} of its chunks",
                        file=sys.stderr,
                    )
                    raise
                origin[fault.name].append(ended.origin)
                early += ended.early
    for name, found in origin.items():
        print(f"{name}: {len(found)} times; origin {min(found):.3f} to {max(found):.3f} x the model")
    print(f"seed {options.seed}; {early} struck too late; {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
