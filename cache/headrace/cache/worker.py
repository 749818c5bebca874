"""A worker process: one more stager over the same maps and locks.

`python -m headrace.cache.worker` reads one JSON object on standard input (see `spawn`), stages what
its parent resolved, writes one JSON object with what it fetched, and exits. It does so early when
standard input closes: its parent has ended, or needs it no more. Started by exec, never by fork:
descriptors and their locks stay apart.
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
from typing import Any, NoReturn

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
    # Held back from birth, as the mask is inherited, until `main` ignores it: a Ctrl-C while Python starts
    # would be a traceback on the terminal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cache.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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


def end(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """End a worker; what it had to say, nothing if it was killed. Waits for it."""
    # This closes its standard input first.
    answer, _ = worker.communicate()
    said: dict[str, Any] = json.loads(answer or "{}")
    return said


async def work(task: dict[str, Any], progress: Progress) -> None:
    """Stage as the task says. Raises HeadraceError."""
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


def main() -> NoReturn:
    # A Ctrl-C at the terminal reaches the parent too, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        # The parent ended before it said what to do.
        sys.exit(1)
    progress, ending = Progress(), threading.Lock()

    def finish(code: int, **more: str) -> NoReturn:
        # Never given back: who comes second waits for the exit.
        ending.acquire()
        try:
            print(json.dumps({"fetched": progress.fetched, "chunks": progress.chunks, **more}), flush=True)
        finally:
            # Also when nobody is there to read it.
            os._exit(code)

    def end_when_told() -> None:
        sys.stdin.read()
        finish(1)

    threading.Thread(target=end_when_told, daemon=True).start()
    try:
        asyncio.run(work(json.loads(line), progress))
    except HeadraceError as error:
        # The parent meets the same error itself, or takes over what was left.
        finish(error.exit_code, error=str(error))
    finish(0)


if __name__ == "__main__":
    main()
