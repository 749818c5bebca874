"""Loads a model while it is being staged, and says where the time went.

python examples/load_while_staging.py s3://models/llama-3-8b/v1
"""

from __future__ import annotations

import sys

from headrace.loader import load


def main(reference: str) -> None:
    model = load(reference)
    stats = model.stats
    print(f"{stats.tensors} tensors, {stats.bytes / 1e9:.2f} GB at {stats.gigabytes_per_second:.2f} GB/s")
    for span in stats.trace:
        print(f"{span.name:10} {span.seconds:8.3f} s")


if __name__ == "__main__":
    main(sys.argv[1])
