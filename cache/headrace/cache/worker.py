"""A worker process: one more stager over the same maps and locks.

`python -m headrace.cache.worker` reads one JSON object on standard input (see `spawn`), stages what
its parent resolved, writes one JSON object with what it fetched, and exits. It ends with its parent:
standard input then closes. Started by exec, never by fork: descriptors and their locks stay apart.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from headrace.cache.errors import HeadraceError
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.progress import Progress
from headrace.cache.reference import Reference
from headrace.cache.stager import Stager, StagerLimits
from headrace.cache.store import Store


def spawn(
    store: Store,
    domain: str,
    snapshot: str,
    reference: Reference,
    options: OriginOptions,
    limits: StagerLimits,
) -> subprocess.Popen[str]:
    """Start a worker on a snapshot that its caller has prepared."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.cache.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    task = {
        "root": str(store.root),
        "domain": domain,
        "snapshot": snapshot,
        "reference": [reference.scheme, reference.location, reference.revision],
        "options": asdict(options),
        "limits": asdict(limits),
    }
    assert process.stdin is not None
    # The options may carry secrets (a proxy's password): a pipe, not the command line.
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    return process


async def work(task: dict[str, Any]) -> Progress:
    """Stage as the task says. Raises HeadraceError."""
    progress = Progress()
    options = {**task["options"], "headers": tuple((k, v) for k, v in task["options"]["headers"])}
    with Store.open(task["root"]) as store:
        domain = store.domain(task["domain"])
        snapshot = domain.snapshot(task["snapshot"])
        origin = open_origin(Reference(*task["reference"]), OriginOptions(**options))
        try:
            limits = StagerLimits(**task["limits"])
            await Stager(store, domain, snapshot, snapshot.manifest(), origin, progress, limits=limits).run()
        finally:
            await origin.close()
    return progress


def main() -> int:
    # A Ctrl-C at the terminal reaches the parent too, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        # The parent ended before it said what to do.
        return 1
    task = json.loads(line)

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        progress = asyncio.run(work(task))
    except HeadraceError as error:
        # The parent meets the same error itself, or takes over what was left.
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    print(json.dumps({"fetched": progress.fetched, "chunks": progress.chunks}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
