"""The agent's staging jobs: one for each thing that is to be staged, however many clients wait for it.

A job runs in a process of its own while it lasts. What a waiting pod needs (`demand`) starts at once and
goes before what is only staged ahead (`prestage`), of which a few run at a time. State lives in the store:
after a crash of the agent a job is simply asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.cache.bandwidth import Class
from headrace.cache.errors import AgentUnavailable, HeadraceError, Interrupted
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import COUNTS, Progress
from headrace.cache.staging import StageReport
from headrace.prefetch import messages
from headrace.prefetch.pacing import paces
from headrace.prefetch.settings import AgentSettings
from headrace.prefetch.staging_process import Task
from headrace.prefetch.supervisor import Supervised

REMEMBERED = 100
"""How many jobs are still listed after their end."""

log = logging.getLogger(__name__)


class Watcher:
    """One client that follows a job, or only asked for it (`waits` is False)."""

    def __init__(self, of: Class, *, waits: bool = True) -> None:
        self.of = of
        self.waits = waits
        self.changed = asyncio.Event()


@dataclass(eq=False)
class Job:
    """One staging run.

    Attributes:
        state: "waiting", "running", "staged", "failed" or "cancelled".
        opened: domain and snapshot, once it can be opened for reading.
        kept: it goes on though nobody waits.
        stopped: it ended because the agent did: whoever waits may go on without.
        began, ended: seconds since the epoch; 0.0 while it has not.
    """

    id: str
    key: tuple[object, ...]
    request: StageRequest
    progress: Progress = field(default_factory=Progress)
    state: str = "waiting"
    kept: bool = False
    stopped: bool = False
    opened: tuple[str, str] | None = None
    report: StageReport | None = None
    error: HeadraceError | None = None
    began: float = 0.0
    ended: float = 0.0
    watchers: set[Watcher] = field(default_factory=set)
    asked: Class = "prestage"
    process: Supervised | None = None
    task: asyncio.Task[None] | None = None

    @property
    def of(self) -> Class:
        """The most urgent of what those who wait, or have asked for it to be kept, need it for."""
        return (
            "demand" if self.asked == "demand" or any(w.of == "demand" for w in self.watchers) else "prestage"
        )

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.id,
            "reference": self.request.reference,
            "domain": self.request.domain,
            "state": self.state,
            "class": self.of,
            "clients": sum(1 for watcher in self.watchers if watcher.waits),
            "kept": self.kept,
            "snapshot": self.opened[1] if self.opened else None,
            "pid": self.process.pid if self.process else None,
            "restarts": self.process.restarts if self.process else 0,
            "began": self.began,
            "ended": self.ended,
            "progress": messages.progress_to_json(self.progress),
            "report": messages.report_to_json(self.report) if self.report else None,
            **(messages.error_to_json(self.error) if self.error else {}),
        }

    def tell(self) -> None:
        """Wake everybody who follows it."""
        for watcher in self.watchers:
            watcher.changed.set()


class JobTable:
    """All jobs of the agent. Used by its event loop only.

    Attributes:
        counts: jobs that have ended, by state.
        fetched: bytes of all jobs, by source.
        done: what all jobs did in the cluster (see `COUNTS`).
        restarts: of staging processes that had died.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        cluster: Callable[[], dict[str, Any] | None] = lambda: None,
        ended: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """
        Args:
            cluster: what a staging process is told of the cluster; None: it stages alone.
            ended: called with each job after its end.
        """
        self._settings = settings
        self._cluster = cluster
        self._ended = ended
        self._active: dict[tuple[object, ...], Job] = {}
        self._past: deque[Job] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._closed = False
        self.counts: dict[str, int] = dict.fromkeys(("staged", "failed", "cancelled"), 0)
        self.fetched: dict[str, int] = {}
        self.done: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.restarts = 0

    def ask(self, request: StageRequest, watcher: Watcher) -> Job:
        """The job for a request: the one that runs already, or a new one. Call `leave` when done with it.

        Raises:
            AgentUnavailable: the agent is stopping.
        """
        if self._closed:
            raise AgentUnavailable(
                "the agent is stopping: ask again when the next one runs, or stage without it."
            )
        key = _key(request)
        job = self._active.get(key)
        if job is None:
            self._number += 1
            job = Job(f"{self._number:06d}", key, request)
            self._active[key] = job
        if watcher.waits:
            job.watchers.add(watcher)
        else:
            job.kept = True
            job.asked = "demand" if "demand" in (job.asked, watcher.of) else "prestage"
        self._schedule()
        return job

    def watch(self, job: Job, watcher: Watcher) -> None:
        """Follow a job that others asked for. Call `leave` when done with it."""
        job.watchers.add(watcher)
        self._schedule()

    def leave(self, job: Job, watcher: Watcher) -> None:
        """A client has gone: a job that was started for its clients ends with the last of them."""
        job.watchers.discard(watcher)
        if not job.over and not job.watchers and not job.kept:
            log.info("nobody waits for %s any more", job.request.reference)
            self.cancel(job)
        self._schedule()

    def cancel(self, job: Job) -> None:
        """End a job; what it has verified stays."""
        if job.task is not None:
            job.task.cancel()
        elif not job.over:
            self._finish(job, "cancelled", error=Interrupted("it was cancelled before it began."))

    def find(self, job_id: str) -> Job | None:
        return next((job for job in self.all() if job.id == job_id), None)

    def active(self) -> Iterable[Job]:
        return list(self._active.values())

    def all(self) -> list[Job]:
        """Those that run or wait, then those that ended, latest first."""
        return [*self._active.values(), *reversed(self._past)]

    def apply(self, settings: AgentSettings) -> None:
        """Other settings, for jobs that begin from now on; rates at once for those that run, too."""
        self._settings = settings
        self._schedule()

    async def close(self) -> None:
        """Take no more, and end all: their claims are given back on return, what is verified stays."""
        self._closed = True
        jobs = list(self._active.values())
        for job in jobs:
            job.stopped = True
            self.cancel(job)
        await asyncio.gather(*(job.task for job in jobs if job.task is not None), return_exceptions=True)

    # -- running

    def _schedule(self) -> None:
        """Start what may start, and share the bandwidth anew."""
        running = [job for job in self._active.values() if job.task is not None]
        ahead = sum(1 for job in running if job.of == "prestage")
        for job in self._active.values():
            if job.task is not None or self._closed:
                continue
            if job.of == "prestage":
                if ahead >= self._settings.prestage_jobs:
                    continue
                ahead += 1
            running.append(job)
            job.state, job.began = "running", time.time()
            job.task = asyncio.create_task(self._run(job), name=f"job {job.id}")
            job.task.add_done_callback(lambda _, job=job: self._settle(job))  # type: ignore[misc]
        shares = paces(self._settings.bandwidth, [job.of for job in running])
        for job in running:
            if job.process is not None:
                job.process.pace(job.of, shares[job.of])

    async def _run(self, job: Job) -> None:
        settings = self._settings
        running = [other.of for other in self._active.values() if other.task is not None]
        task = Task(
            settings.text,
            settings.where,
            str(settings.root),
            messages.request_to_json(job.request),
            job.of,
            paces(settings.bandwidth, running)[job.of],
            self._cluster(),
        )
        seen: tuple[dict[str, int], dict[str, int]] = {}, {}

        def moved() -> None:
            _add_up(self.fetched, job.progress.fetched, seen[0])
            _add_up(self.done, job.progress.counts, seen[1])
            job.tell()

        def opened(domain: str, snapshot: str) -> None:
            job.opened = domain, snapshot
            job.tell()

        job.process = Supervised(task, job.progress, opened=opened, moved=moved)
        log.info("staging %s (%s)", job.request.reference, job.of)
        try:
            job.report = await job.process.run()
            self._finish(job, "staged")
        except asyncio.CancelledError:
            self._finish(
                job,
                "cancelled",
                Interrupted("staging was interrupted; what arrived is kept, and the next run resumes."),
            )
        except HeadraceError as error:
            self._finish(job, "cancelled" if isinstance(error, Interrupted) else "failed", error)
        except Exception as error:
            log.exception("the job for %s failed", job.request.reference)
            self._finish(job, "failed", HeadraceError(f"the agent failed: {error}; its log says more."))
        finally:
            self.restarts += job.process.restarts

    def _settle(self, job: Job) -> None:
        # A task that is cancelled before its first step never comes to its own end.
        if not job.over:
            self._finish(job, "cancelled", Interrupted("it was cancelled before it began."))

    def _finish(self, job: Job, state: str, error: HeadraceError | None = None) -> None:
        # What it was needed for is still said when those who waited have gone.
        job.asked = job.of
        job.state, job.error, job.ended = state, error, time.time()
        self._active.pop(job.key, None)
        self._past.append(job)
        self.counts[state] += 1
        for note in job.progress.notes:
            log.warning("staging %s: %s", job.request.reference, note)
        if state == "failed":
            log.warning("staging %s failed: %s", job.request.reference, error)
        else:
            log.info("%s: %s", job.request.reference, state)
        job.tell()
        self._ended(job)
        self._schedule()


def _add_up(total: dict[str, int], now: Mapping[str, int], before: dict[str, int]) -> None:
    """Add what one job has more than `before`, which it is then."""
    for name, value in now.items():
        total[name] = total.get(name, 0) + value - before.get(name, 0)
        before[name] = value


def _key(request: StageRequest) -> tuple[object, ...]:
    """What makes two requests one job: everything that decides which bytes are staged, and how well vouched for."""
    return (
        request.reference,
        request.domain,
        request.selection,
        request.revalidate,
        request.require,
        request.keys,
        request.chunk,
        request.algorithm,
        request.name,
    )
