"""A staging process: one job of the agent, in a process of its own.

`python -m headrace.prefetch.staging_process` reads one JSON object on standard input (see `Task`), then
control lines; it writes JSON lines: `opened`, `progress`, and at the end `report` or `error`. It ends when
standard input closes, as the agent has then ended. Started by exec, never by fork.

Crash story: that of `headrace.cache.stager`. Claims die with the process, verified chunks stay.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any, NoReturn

from headrace.cache import config
from headrace.cache.bandwidth import Class
from headrace.cache.cluster import ClusterSettings
from headrace.cache.errors import HeadraceError, Interrupted
from headrace.cache.progress import Progress
from headrace.cache.staging import StagingJob
from headrace.prefetch import messages

BUG = 70
"""Exit code of an error that headrace did not expect."""
_TICK = 0.1  # seconds between two looks at what was done


@dataclass(frozen=True, slots=True)
class Task:
    """What a staging process is told first.

    Attributes:
        config, where: the text of the configuration and where it came from; may hold a proxy's password.
        request: see `messages.request_to_json`.
        of: the class of its bandwidth, "demand" or "prestage".
        rates: bytes per second by kind of traffic; None: no limit.
        cluster: see `headrace.cache.cluster`; None: alone.
    """

    config: str = field(repr=False)
    where: str
    root: str
    request: dict[str, Any]
    of: Class
    rates: dict[str, float | None]
    cluster: dict[str, Any] | None = None


class _Voice:
    """Writes lines to the agent, from any thread; its end is this process's end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, **values: Any) -> None:
        with self._lock:
            try:
                print(json.dumps(values), flush=True)
            except BrokenPipeError:
                os._exit(Interrupted.exit_code)

    def finish(self, code: int, **values: Any) -> NoReturn:
        self.say(**values)
        os._exit(code)


def main() -> NoReturn:
    # A Ctrl-C at a terminal reaches the agent too, which tells its processes what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        sys.exit(1)
    voice = _Voice()
    try:
        task = Task(**json.loads(line))
        job = _job(task)
        job.start()
        threading.Thread(target=_listen, args=(job,), name="headrace-control", daemon=True).start()
        _report(job, voice)
    except HeadraceError as error:
        voice.finish(error.exit_code, **messages.error_to_json(error))
    except Exception:  # noqa: BLE001  (the outermost frame: shown whole in the agent's log, as the bug it is)
        traceback.print_exc()
        os._exit(BUG)


def _job(task: Task) -> StagingJob:
    settings = config.parse(task.config, task.where)
    request = messages.request_from_json(task.request, task.root)
    cluster = None if task.cluster is None else ClusterSettings.from_json(task.cluster)
    job = StagingJob(request, Progress(), settings=settings, cluster=cluster)
    job.set_pace(task.of, task.rates)
    return job


def _listen(job: StagingJob) -> None:
    """Control lines: `pace`, `cancel`; the end of input is a cancellation."""
    for line in sys.stdin:
        told = json.loads(line)
        if "pace" in told:
            job.set_pace(told["pace"]["of"], told["pace"]["rates"])
        if told.get("cancel"):
            break
    job.cancel()
    # The main thread reports and ends the process; not even that is needed when nobody listens any more.


def _report(job: StagingJob, voice: _Voice) -> NoReturn:
    """Say what is going on until the job has ended."""
    opened, said = False, ""
    while True:
        ended = job.wait_ended(_TICK)
        progress = messages.progress_to_json(job.progress)
        now = json.dumps({**progress, "seconds": 0})
        if now != said:
            said = now
            voice.say(progress=progress)
        if not opened and job.prepared.is_set() and job.opened is not None:
            opened = True
            domain, snapshot = job.opened
            voice.say(opened={"domain": domain.name, "snapshot": snapshot.id})
        if ended:
            voice.finish(0, report=messages.report_to_json(job.wait()))


if __name__ == "__main__":
    main()
