"""The long form of `loader/test_header_fuzz.py`: the header parser against mutated files, minutes of them.

Run by `make campaign`. `--minutes` says how long, `--seed` which files, `--smoke` is a few seconds; file `number`
of a seed can be looked at again with `--only number`. Every file is read by our parser, both ways of it, and by the
reference. With atheris installed (pip install 'headrace[fuzz]') `--coverage` lets libFuzzer keep and change the
files that reach new places in the parser; what it finds lies in `--corpus` then. Prints one line, and ends with an
error and the file's bytes at the first one that is read wrongly.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import random
import sys
import time
from pathlib import Path
from typing import Any

from support.header_mutations import good_file, mutated
from support.header_reading import Verdict, examine

SMOKE = 1 / 20
"""Minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one file of the seed, shown")
    parser.add_argument("--coverage", action="store_true", help="guided by coverage, with atheris")
    parser.add_argument("--corpus", type=Path, help="with --coverage: a folder to keep files in")
    options = parser.parse_args()
    if options.only is not None:
        content = made(options.seed, options.only)
        print(repr(content))
        print(examine(content))
        return 0
    minutes = SMOKE if options.smoke else options.minutes
    if options.coverage:
        return guided(options.seed, minutes, options.corpus)
    return blind(options.seed, minutes)


def made(seed: int, number: int) -> bytes:
    """File `number` of a seed: one in ten undamaged."""
    choose = random.Random(f"{seed}.{number}")
    content = good_file(choose)
    return mutated(choose, content) if number % 10 else content


def blind(seed: int, minutes: float) -> int:
    begun = time.monotonic()
    verdicts: collections.Counter[tuple[bool, bool]] = collections.Counter()
    slowest = 0.0
    number = 0
    while time.monotonic() - begun < 60 * minutes:
        content = made(seed, number)
        started = time.perf_counter()
        try:
            verdict = examine(content)
        except BaseException:
            print(f"seed {seed}, file {number}: {content!r}", flush=True)
            raise
        slowest = max(slowest, time.perf_counter() - started)
        verdicts[verdict.accepted, verdict.reference] += 1
        number += 1
    print(
        f"header: seed {seed}; {number} files: {verdicts[True, True]} read alike, {verdicts[False, False]} refused, "
        f"{verdicts[False, True]} refused by us alone, as documented; the slowest took {1000 * slowest:.0f} ms; "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )
    return 0


def guided(seed: int, minutes: float, corpus: Path | None) -> int:
    """libFuzzer never returns: it ends the process."""
    if importlib.util.find_spec("atheris") is None:
        print("header, guided by coverage: not done, atheris is not installed (pip install 'headrace[fuzz]')")
        return 0
    atheris: Any = importlib.import_module("atheris")
    for name in ("headrace.cache.safetensors", "headrace.cache.compact"):
        module = sys.modules[name]
        for function in vars(module).values():
            if getattr(function, "__module__", None) == name and hasattr(function, "__code__"):
                atheris.instrument_func(function)

    def once(content: bytes) -> Verdict:
        return examine(content)

    def change(content: bytes, most: int, number: int) -> bytes:
        """Half by libFuzzer's own means, half by ours, from a file of its corpus or a new one."""
        choose = random.Random(number)
        if choose.random() < 0.5:
            fresh: bytes = atheris.Mutate(content, most)
            return fresh
        start = good_file(choose) if len(content) < 10 or choose.random() < 0.05 else content
        return mutated(choose, start)[:most]

    flags = [
        f"-max_total_time={max(1, round(60 * minutes))}",
        f"-seed={seed}",
        "-max_len=4096",
        "-print_final_stats=1",
    ]
    folder = [] if corpus is None else [str(corpus)]
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], *flags, *folder], once, custom_mutator=change)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
