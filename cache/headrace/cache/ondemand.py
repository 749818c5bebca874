"""A model whose files are read in parts: resolved at once, staged while somebody reads.

Listing its files asks the origin what the reference points to, and moves no data. Opening a file that is not
complete starts staging, which brings what readers wait for first; a while after the last file was closed it
is stopped. What was verified until then stays, and the next reader goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from headrace.cache import config
from headrace.cache.errors import NotFound, StoreError
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import read_exactly
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.prepare import StageRequest, prepare
from headrace.cache.progress import Progress
from headrace.cache.reading import StoredSnapshot
from headrace.cache.reference import parse
from headrace.cache.snapshot import Selection, Snapshot
from headrace.cache.staging import StagingJob
from headrace.cache.store import Domain, Store, default_root, may_write

LINGER = 2.0
"""Seconds for which staging goes on after the last file was closed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which store, and how it is filled. None stands for what the configuration says.

    Attributes:
        options: changes an origin's options.
    """

    root: str | None = None
    domain: str | None = None
    revalidate: str | None = None
    selection: Selection = field(default_factory=Selection)
    options: Callable[[OriginOptions], OriginOptions] = lambda options: options

    def path(self) -> str:
        return str(self.root or config.load().root or default_root())

    def remembers(self, reference: str) -> bool:
        """Whether this store knows what the reference stands for."""
        if not os.path.exists(os.path.join(self.path(), "format")):
            return False
        with Store.open(self.path(), writable=False) as store:
            domain = store.domain(self.domain or config.load().domain)
            return domain.resolved(str(parse(reference)), self.selection) is not None

    def request(self, reference: str) -> StageRequest:
        settings = config.load()
        options = self.options(settings.options(parse(reference)))
        return StageRequest(
            reference, self.path(), self.domain, self.selection, self.revalidate, options=options
        )


class OnDemand:
    """One model. Used by several threads; files may outlive `close`."""

    def __init__(self, reference: str, place: Place) -> None:
        """Resolve the reference.

        Raises:
            NotFound: there is nothing.
            HeadraceError: the origin refuses, or the store cannot be used.
        """
        self.reference = str(parse(reference))
        self._request = place.request(reference)
        self._lock = threading.Lock()
        self._readers = 0
        self._job: StagingJob | None = None
        self._timer: threading.Timer | None = None
        self._writable = may_write(place.path())
        if self._writable:
            # In a thread of its own, because the caller's may run an event loop.
            with ThreadPoolExecutor(1, thread_name_prefix="headrace-resolve") as pool:
                self._domain, self._snapshot = pool.submit(
                    lambda: asyncio.run(_resolve(self._request))
                ).result()
        else:
            with Store.open(place.path(), writable=False) as store:
                self._domain = store.domain(place.domain or config.load().domain)
                self._snapshot = self._domain.find(self.reference)
        self.manifest: Manifest = self._snapshot.manifest()
        self.snapshot: str = self._snapshot.id

    def content_key(self, file: ManifestFile) -> str:
        return file.content_key(self.manifest.uri, self.manifest.algorithm)

    def open(self, path: str) -> ReadInParts:
        """Open one file; of a file that is not complete, staging starts.

        Raises:
            NotFound: the model has no such file.
            HeadraceError: staging failed before anything could be read.
        """
        file = self.manifest.by_path.get(path)
        if file is None:
            raise NotFound(f"{self.reference} has no file {path!r}.")
        folder = self._domain.object(self.manifest.object_id(self._domain.name, file))
        if folder.data.exists():
            opened = self._open(path, None, lambda: None)
            if self._writable:
                self._snapshot.touch_used()
            return opened
        self._begin()
        try:
            job = self._staging()
            job.wait_prepared()
            return self._open(path, job, self._end)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Stop staging, unless files are open: then when they are closed."""
        self._stop_if_idle()

    def _open(self, path: str, job: StagingJob | None, closed: Callable[[], None]) -> ReadInParts:
        check = (lambda: None) if job is None else job.check
        # It holds the snapshot: a model of which a file is open is not evicted.
        snapshot = StoredSnapshot(self._domain, self._snapshot, name=self.reference, check=check, job=job)
        try:
            return ReadInParts(snapshot, path, closed)
        except BaseException:
            snapshot.close()
            raise

    def _staging(self) -> StagingJob:
        with self._lock:
            if self._job is None or self._job.ended:
                # What it points to was asked already, and must not change between two files.
                request = replace(self._request, revalidate="never")
                self._job = StagingJob(request).start()
            return self._job

    def _begin(self) -> None:
        with self._lock:
            self._readers += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _end(self) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers or self._job is None:
                return
            self._timer = threading.Timer(LINGER, self._stop_if_idle)
            self._timer.name = "headrace-linger"
            self._timer.daemon = True
            self._timer.start()

    def _stop_if_idle(self) -> None:
        with self._lock:
            if self._readers:
                return
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._job is not None:
                self._job.cancel()
                self._job = None


class ReadInParts:
    """An open file; every read waits for just its bytes."""

    def __init__(self, snapshot: StoredSnapshot, path: str, closed: Callable[[], None]) -> None:
        """
        Args:
            closed: called at the end.
        """
        self._snapshot = snapshot
        self._file = snapshot.open(path)
        self.size = self._file.size
        self._closed: Callable[[], None] | None = closed

    def want(self, start: int, stop: int) -> None:
        """Ask for [start, stop) to be staged first, and do not wait."""
        self._file.wait(start, stop, timeout=0)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), cut at the end of the file.

        Raises:
            StagingStopped: they are not here, and nobody stages them.
            HeadraceError: what staging failed with.
        """
        stop = min(stop, self.size)
        if stop <= start:
            return b""
        self._file.wait(start, stop)
        data = read_exactly(self._file.fileno(), start, stop)
        if data is None:
            raise StoreError(f"{self._file.path!r} became shorter in the store: run `headrace verify`.")
        return data

    def close(self) -> None:
        if self._closed is not None:
            self._file.close()
            self._snapshot.close()
            self._closed()
            self._closed = None


async def _resolve(request: StageRequest) -> tuple[Domain, Snapshot]:
    settings = config.load()
    reference = parse(request.reference)
    with Store.open(request.root) as store:
        domain = store.domain(request.domain or settings.domain)
        origin = open_origin(reference, request.options or settings.options(reference))
        try:
            prepared = await prepare(domain, store, request, settings, reference, origin, Progress())
            prepared.close()
        finally:
            await origin.close()
    return domain, prepared.snapshot
