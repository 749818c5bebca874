"""Staging a reference: resolve, make the snapshot, fill it, say what was done.

`stage` blocks; `StagingJob` runs in its own thread with its own event loop, so that a loader can read
while it fills, and Ctrl-C stops it cleanly: claims die with the job, verified chunks stay.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.cache import archive, config
from headrace.cache.config import Config
from headrace.cache.errors import Interrupted, NotStaged
from headrace.cache.grid import check_chunk_size
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.prepare import StageRequest, prepare
from headrace.cache.progress import Progress
from headrace.cache.reading import StoredSnapshot
from headrace.cache.reference import Reference, parse
from headrace.cache.selection import Skipped
from headrace.cache.snapshot import Selection, Snapshot
from headrace.cache.stager import Stager
from headrace.cache.store import Domain, Store, default_root, may_write
from headrace.cache.worker import Pacing, end, spawn

if TYPE_CHECKING:
    from headrace.cache.bandwidth import Class
    from headrace.cache.cluster import Cluster, ClusterSettings

_WORKER_WORTH = 4 << 30


@dataclass(frozen=True, slots=True)
class StageReport:
    """What was staged; `sources` in bytes fetched in this run.

    Attributes:
        path: the folder with the files.
        last_mark: seconds from the start until the last chunk was there.
    """

    reference: str
    snapshot: str
    path: str
    files: int
    bytes: int
    chunks: int
    seconds: float
    sources: dict[str, int]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    last_mark: float = 0.0


class StagingJob:
    """One staging run in a thread of its own.

    Attributes:
        opened: the domain and snapshot, once known.
        prepared: set when the snapshot can be opened for reading, or staging has ended.
    """

    def __init__(
        self,
        request: StageRequest,
        progress: Progress | None = None,
        *,
        settings: Config | None = None,
        cluster: ClusterSettings | Callable[[], Cluster] | None = None,
    ) -> None:
        """
        Args:
            settings: the configuration; None: as `config.load` finds it.
            cluster: how to take part in it, or what opens it, which is then called in the job's thread; None: alone.
        """
        self.request = request
        self.progress = progress or Progress()
        self.settings = settings
        self.cluster = cluster
        self.pacing = Pacing()
        self.opened: tuple[Domain, Snapshot] | None = None
        self._report: StageReport | None = None
        self._error: BaseException | None = None
        self.prepared = threading.Event()
        self._ended = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[StageReport] | None = None
        self._thread = threading.Thread(target=self._main, name="headrace-staging", daemon=True)

    def set_pace(self, of: Class, rates: Mapping[str, float | None]) -> None:
        """Another class and other rates from now on; from any thread.

        Args:
            rates: bytes per second of the whole job by kind of traffic ("origin", "peers", "disk"); None, or not
                named: no limit; 0: pause.
        """
        self.pacing.set(of, rates)

    def start(self) -> StagingJob:
        self._thread.start()
        return self

    def _main(self) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._report = runner.run(self._run())
        except asyncio.CancelledError:
            self._error = Interrupted(
                "staging was interrupted; what arrived is kept, and the next run resumes."
            )
        except BaseException as error:  # noqa: BLE001  (handed to the waiting thread, which raises it)
            self._error = error
        finally:
            self._ended.set()
            self.prepared.set()

    async def _run(self) -> StageReport:
        self._task = asyncio.current_task()
        return await _stage(self)

    def wait(self) -> StageReport:
        """The report, when staging has ended.

        Raises:
            HeadraceError: what it ended with; Interrupted after `cancel`.
        """
        # With a bound, so that a Ctrl-C is seen between two waits.
        while not self._ended.wait(0.2):
            pass
        self.check()
        if self._report is None:
            raise Interrupted("staging was interrupted; what arrived is kept, and the next run resumes.")
        return self._report

    def wait_prepared(self) -> tuple[Domain, Snapshot]:
        """The domain and snapshot, when it can be opened for reading.

        Raises:
            HeadraceError: what staging ended with before that.
        """
        while not self.prepared.wait(0.2):
            pass
        self.check()
        assert self.opened is not None  # it is prepared, and has not failed
        return self.opened

    def wait_ended(self, seconds: float) -> bool:
        """Wait at most so long; whether nothing runs any more."""
        return self._ended.wait(seconds)

    @property
    def ended(self) -> bool:
        """Whether nothing runs any more, however it ended."""
        return self._ended.is_set()

    def check(self) -> None:
        """Raise what staging has failed with, if it has."""
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop at once; in-flight chunks are lost, marked ones stay. Returns when nothing runs any more."""
        while self._loop is None and not self._ended.is_set():
            time.sleep(0.001)
        if self._loop is not None and self._task is not None and not self._ended.is_set():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()


def stage(
    reference: str,
    *,
    root: str | os.PathLike[str] | None = None,
    domain: str | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    revalidate: str | None = None,
    require: str | None = None,
    workers: int | None = None,
    options: OriginOptions | None = None,
    progress: Progress | None = None,
) -> StageReport:
    """Stage a model reference into the store, verified, and wait for it.

    Raises:
        HeadraceError: what went wrong, in one sentence; what was verified is kept.
    """
    request = StageRequest(
        reference,
        None if root is None else os.fspath(root),
        domain,
        Selection(tuple(include), tuple(ignore)),
        revalidate,
        require,
        workers=workers,
        options=options,
    )
    return run(StagingJob(request, progress))


def run(job: StagingJob) -> StageReport:
    """Start a job and wait; Ctrl-C cancels it. Raises as `StagingJob.wait`."""
    job.start()
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.cancel()
        raise Interrupted("interrupted; what arrived is kept, and the next run resumes.") from None


def open_for_loading(
    reference: str,
    *,
    root: str | None = None,
    domain: str | None = None,
    progress: Progress | None = None,
    begin: Callable[[], StagingJob] | None = None,
) -> StoredSnapshot:
    """A reference as a loader's source, staged in the background as far as needed.

    Closing the source lets staging go on to its end in the background of this process.

    Args:
        begin: makes the job that stages it; None: one of this process.

    Raises:
        HeadraceError: it cannot be resolved, or the store not opened.
    """
    settings = config.load()
    where = str(root or settings.root or default_root())
    if not may_write(where):
        # Another user's store: what is complete there can be read, nothing can be staged.
        with Store.open(where, writable=False) as store:
            found = store.domain(domain or settings.domain)
            snapshot = found.find(str(parse(reference)))
            if not snapshot.complete:
                raise NotStaged(
                    f"{reference} is still being staged into {where!r}: wait for `headrace stage` to end."
                )
            return StoredSnapshot(found, snapshot, name=reference)
    job = (begin() if begin else StagingJob(StageRequest(reference, root, domain), progress)).start()
    try:
        opened = job.wait_prepared()
    except KeyboardInterrupt:
        job.cancel()
        raise Interrupted("interrupted; what arrived is kept, and the next run resumes.") from None
    return StoredSnapshot(*opened, name=reference, check=job.check, job=job)


async def _stage(job: StagingJob) -> StageReport:
    settings = job.settings or config.load()
    async with _cluster_of(job, job.request.domain or settings.domain) as cluster:
        return await _stage_with(job, settings, cluster)


async def _stage_with(job: StagingJob, settings: Config, cluster: Cluster | None) -> StageReport:
    request, progress = job.request, job.progress
    reference = parse(request.reference)
    check_chunk_size(request.chunk)
    options = request.options or settings.options(reference)
    with Store.open(request.root or settings.root) as store:
        domain = store.domain(request.domain or settings.domain)
        origin = open_origin(reference, options)
        try:
            prepared = await prepare(
                domain,
                store,
                request,
                settings,
                reference,
                origin,
                progress,
                cluster=cluster,
                options=options,
            )
            try:
                snapshot, manifest = prepared.snapshot, prepared.manifest
                whole = not archive.is_archive(manifest)
                derived = None if whole else archive.find(domain, snapshot, prepared.name, request.selection)
                progress.total = manifest.size
                job.opened = domain, snapshot

                def announce() -> None:
                    if whole:
                        job.prepared.set()

                if derived is not None:
                    progress.present = progress.total
                elif snapshot.complete and domain.has_objects(manifest):
                    snapshot.relink(domain.object_files(manifest))
                    snapshot.touch_used()
                    progress.present = progress.total
                else:
                    stager = Stager(
                        store, domain, snapshot, manifest, origin, progress,
                        headers=prepared.headers, limits=request.limits, announce=announce,
                        pace=job.pacing.own, cluster=cluster,
                    )  # fmt: skip
                    await _with_workers(stager, store, domain, snapshot, reference, options, job, settings)
                if not whole and derived is None:
                    derived = await archive.derive(
                        store,
                        domain,
                        snapshot,
                        manifest,
                        prepared.name,
                        request.selection,
                        chunk=request.chunk,
                    )
                if derived is not None:
                    snapshot, manifest = derived.snapshot, derived.manifest
                    job.opened = domain, snapshot
                progress.phase = "staged"
            finally:
                prepared.close()
        finally:
            await origin.close()
    return StageReport(
        request.reference,
        snapshot.id,
        str(snapshot.files),
        len(manifest.files),
        manifest.size,
        progress.chunks,
        progress.seconds,
        dict(progress.fetched),
        prepared.skipped + (derived.skipped if derived is not None else ()),
        tuple(progress.notes),
        max(0.0, progress.last_mark - progress.started),
    )


@asynccontextmanager
async def _cluster_of(job: StagingJob, domain: str) -> AsyncIterator[Cluster | None]:
    """What the job takes part in, if it does."""
    if job.cluster is None:
        yield None
        return
    if callable(job.cluster):
        cluster = job.cluster()
    else:
        # Alone, nothing of the cluster is imported.
        from headrace.cache.cluster import Cluster

        progress = job.progress
        cluster = Cluster.open(
            job.cluster, domain, progress.note, called=lambda: progress.count("tracker_calls")
        )
    try:
        yield cluster
    finally:
        await cluster.close()


async def _with_workers(
    stager: Stager,
    store: Store,
    domain: Domain,
    snapshot: Snapshot,
    reference: Reference,
    options: OriginOptions,
    job: StagingJob,
    settings: Config,
) -> None:
    """Run a stager here, and worker processes beside it on the same maps and locks."""
    count = settings.workers if job.request.workers is None else job.request.workers
    if count == 0:
        cores = len(os.sched_getaffinity(0))
        count = max(1, min(8, cores // 4)) if job.progress.total >= _WORKER_WORTH else 1
    workers: list[subprocess.Popen[str]] = []
    cluster = None if callable(job.cluster) else job.cluster
    try:
        for _ in range(count - 1):
            limits = job.request.limits
            workers += [spawn(store, domain.name, snapshot.id, reference, options, limits, cluster)]
        job.pacing.share_with(workers)
        await stager.run()
        job.pacing.share_with([])
        for worker in workers:
            done = await asyncio.to_thread(end, worker)
            if done:
                job.progress.absorb(done["fetched"], done["chunks"], done.get("counts", {}))
    finally:
        job.pacing.share_with([])
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.communicate()
