"""The long form of `tracker/test_model.py`: thousands of histories, told to Redis, to Valkey and to the model.

Run by `make campaign`; `--smoke` tells a few. Prints how many were compared, and ends with an error, and the history,
at the first difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support.redis_server import BINARY, RedisServer
from support.tracker_machine import TrackerMachine
from support.trackers import valkey_binary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="20 histories")
    parser.add_argument("--histories", type=int, default=1000, help="for each server")
    parser.add_argument("--steps", type=int, default=50, help="in each history")
    options = parser.parse_args()
    histories = 20 if options.smoke else options.histories
    for name, binary in (("Redis", BINARY), ("Valkey", valkey_binary())):
        if binary is None:
            print(f"{name}: not installed, left out")
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, RedisServer(folder, binary=binary) as server:

            class Machine(TrackerMachine):
                url = server.url

            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=histories, stateful_step_count=options.steps, deadline=None, database=None
                ),
            )
        print(
            f"{name}: {histories} histories of up to {options.steps} steps, {time.monotonic() - begun:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
