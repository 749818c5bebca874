"""A worker process: one more stager over the same maps and locks.

`python -m headrace.cache.worker` reads one JSON object on standard input (see `spawn`), stages what
its parent resolved, writes one JSON object with what it fetched, and exits. It does so early when
standard input closes: its parent has ended, or needs it no more. Further lines there change its pace. Started by
exec, never by fork: descriptors and their locks stay apart.

In a cluster each worker is a stager of its own with the node's identity: it asks the tracker for what it wants
itself. A claim at the tracker is the node's; which of its stagers reads by it, the kernel's claim says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.cache.errors import HeadraceError
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress
from headrace.cache.reference import Reference
from headrace.cache.stager import Stager, StagerLimits
from headrace.cache.store import Store

if TYPE_CHECKING:
    from headrace.cache.bandwidth import Class
    from headrace.cache.cluster import ClusterSettings


def spawn(
    store: Store,
    domain: str,
    snapshot: str,
    reference: Reference,
    options: OriginOptions,
    limits: StagerLimits,
    cluster: ClusterSettings | None = None,
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
        "cluster": None if cluster is None else cluster.as_json(),
    }
    # The options may carry secrets (a proxy's password): a pipe, not the command line.
    _tell(process, task)
    return process


def _tell(worker: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which `end` will notice
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()


class Pacing:
    """The pace of a whole job: this process's own, and its workers'. Used from any thread.

    Attributes:
        own: of the stager in this process.
    """

    def __init__(self) -> None:
        self.own = Pace()
        self._lock = threading.Lock()
        self._of: Class = "demand"
        self._rates: dict[str, float | None] = {}
        self._workers: Sequence[subprocess.Popen[str]] = ()

    def set(self, of: Class, rates: Mapping[str, float | None]) -> None:
        """Another class and other rates, of all together."""
        with self._lock:
            self._of, self._rates = of, dict(rates)
            self._apply()

    def share_with(self, workers: Sequence[subprocess.Popen[str]]) -> None:
        """These workers share the rates from now on."""
        with self._lock:
            self._workers = tuple(workers)
            self._apply()

    def _apply(self) -> None:
        told = {"of": self._of, "rates": self._rates, "share": 1 + len(self._workers)}
        self.own.set(self._of, self._rates, 1 + len(self._workers))
        for worker in self._workers:
            _tell(worker, told)


def end(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """End a worker; what it had to say, nothing if it was killed. Waits for it."""
    # This closes its standard input first.
    answer, _ = worker.communicate()
    said: dict[str, Any] = json.loads(answer or "{}")
    return said


async def work(task: dict[str, Any], progress: Progress, pace: Pace) -> None:
    """Stage as the task says. Raises HeadraceError."""
    options = {**task["options"], "headers": tuple((k, v) for k, v in task["options"]["headers"])}
    with Store.open(task["root"]) as store:
        domain = store.domain(task["domain"])
        snapshot = domain.snapshot(task["snapshot"])
        origin = open_origin(Reference(*task["reference"]), OriginOptions(**options))
        try:
            cluster = None
            if task["cluster"] is not None:
                # Alone, nothing of the cluster is imported.
                from headrace.cache.cluster import Cluster, ClusterSettings

                settings = ClusterSettings.from_json(task["cluster"])
                cluster = Cluster.open(settings, domain.name, called=lambda: progress.count("tracker_calls"))
            try:
                await Stager(
                    store, domain, snapshot, snapshot.manifest(), origin, progress,
                    limits=StagerLimits(**task["limits"]), pace=pace, cluster=cluster,
                ).run()  # fmt: skip
            finally:
                if cluster is not None:
                    await cluster.close()
        finally:
            await origin.close()


def main() -> NoReturn:
    # A Ctrl-C at the terminal reaches the parent too, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        # The parent ended before it said what to do.
        sys.exit(1)
    task = json.loads(line)
    progress, pace, ending = Progress(), Pace(), threading.Lock()

    def finish(code: int, **more: str) -> NoReturn:
        # Never given back: who comes second waits for the exit.
        ending.acquire()
        try:
            done = {"fetched": progress.fetched, "chunks": progress.chunks, "counts": progress.counts}
            print(json.dumps({**done, **more}), flush=True)
        finally:
            # Also when nobody is there to read it.
            os._exit(code)

    def listen() -> None:
        for told in sys.stdin:
            pace.set(**json.loads(told))
        finish(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        asyncio.run(work(task, progress, pace))
    except HeadraceError as error:
        # The parent meets the same error itself, or takes over what was left.
        finish(error.exit_code, error=str(error))
    finish(0)


if __name__ == "__main__":
    main()
