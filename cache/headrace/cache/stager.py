"""The stager: fills the objects of one snapshot, chunk by chunk, verified, and links it.

It opens the objects, takes what is on this disk, completes what is full and links it. In between the chunks come:
alone from the origin (see `fetching`), or with other nodes (see `swarm`).

Crash story: `object` and `snapshot` hold it; the stager itself keeps no state on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from headrace.cache import disk, reuse
from headrace.cache import object as objects
from headrace.cache.chunkmap import ABSENT
from headrace.cache.durable import sync_dir
from headrace.cache.errors import HeadraceError, IntegrityError, Interrupted, NoSpace, StoreError
from headrace.cache.fetching import Bringing, Fetching, Pools
from headrace.cache.filling import ChunkSink, Filling
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.numbering import Numbering
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter
from headrace.cache.origins import RetryingOrigin
from headrace.cache.pace import Pace
from headrace.cache.progress import Progress
from headrace.cache.snapshot import Snapshot
from headrace.cache.sources import LocalSource, OriginSource
from headrace.cache.store import Domain, Store
from headrace.cache.threads import to_its_end

if TYPE_CHECKING:
    from headrace.cache.cluster import Cluster

_POLL_FIRST, _POLL_MOST = 0.002, 0.1
_SAMPLE = 0.5
_TICK = 0.01
# Hashing and writing what the event loop received: more threads than cores only take the interpreter's
# lock from each other (measured from nginx, 2 cores: 1.07 GB/s with 2 threads, 0.85 with 8).
_THREADS = max(2, min(8, len(os.sched_getaffinity(0))))
_SYNCS = 2
_MARGIN = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StagerLimits:
    """Bounds of one stager.

    Attributes:
        span: bytes that are claimed and read at once: adjacent chunks together, up to this.
        connections: never more than this many reads at once; each holds a piece of its origin, at most 8 MiB.
        reserve: bytes of the file system that stay free.
    """

    span: int = 16 << 20
    connections: int = 16
    reserve: int = 64 << 20


class Stager:
    """One stager's run over one snapshot; `run` it once."""

    def __init__(
        self,
        store: Store,
        domain: Domain,
        snapshot: Snapshot,
        manifest: Manifest,
        origin: RetryingOrigin,
        progress: Progress,
        *,
        headers: dict[str, bytes] | None = None,
        limits: StagerLimits | None = None,
        announce: Callable[[], None] = lambda: None,
        pace: Pace | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        """
        Args:
            headers: bytes already read from the origin: the start of files, by path.
            announce: called when every object exists and can be opened for reading.
            pace: how fast; None: as fast as it goes.
            cluster: to exchange chunks with; None: it stages alone.
        """
        self._announce = announce
        self._store = store
        self._domain = domain
        self._snapshot = snapshot
        self._manifest = manifest
        self._origin = origin
        self._progress = progress
        self._headers = headers or {}
        self._limits = limits or StagerLimits()
        self._pace = pace
        self._cluster = cluster
        self._all: list[Filling] = []
        self._open: list[Filling] = []
        self._local: reuse.LocalChunks | None = None
        # Both end before any descriptor is closed. What waits for the disk has threads of its own.
        self._writing = ThreadPoolExecutor(_THREADS, "headrace-stager")
        self._syncing = ThreadPoolExecutor(_SYNCS, "headrace-sync")
        self._cancelled = threading.Event()

    async def run(self) -> None:
        """Fill, complete and link everything.

        Raises:
            NoSpace, OriginError, IntegrityError, StoreError: with what is verified kept.
        """
        try:
            with disk.translate(self._snapshot.path, "staging"):
                await self._in_thread(self._open_objects)
                self._announce()
                await self._in_thread(self._look_around)
                self._progress.phase = "staging"
                await self._fill()
                files = self._domain.object_files(self._manifest)
                await self._in_thread(sync_dir, self._domain.path / "objects")
                await self._in_thread(self._snapshot.link, files, self._store.tmp)
                await self._in_thread(self._snapshot.relink, files)
                self._snapshot.touch_used()
        except NoSpace as error:
            raise self._how_much_is_missing(error) from error
        finally:
            self._writing.shutdown(wait=True)
            self._syncing.shutdown(wait=True)
            for filling in self._all:
                filling.writer.close()

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        """Run work that reads or syncs a lot."""
        return await to_its_end(self._syncing, work, *args, cancel=self._cancelled.set)

    def _go_on(self) -> None:
        """Called now and then by long work in the pool: ends it when the stager was cancelled."""
        if self._cancelled.is_set():
            raise Interrupted("staging was interrupted.")

    # -- opening

    def _open_objects(self) -> None:
        by_id: dict[str, ManifestFile] = {}
        for file in self._manifest.files:
            by_id.setdefault(self._manifest.object_id(self._domain.name, file), file)
        while damaged := self._try_open(by_id):
            # Only a power loss leaves these, and none of their chunks was durable.
            for folder, seen in damaged:
                self._store.discard(folder, seen)

    def _try_open(self, by_id: dict[str, ManifestFile]) -> list[tuple[ObjectFolder, os.stat_result]]:
        """Open what is not open yet; the folders that are damaged and have to be made again."""
        damaged = []
        opened = {f.writer.spec.id for f in self._all}
        with self._store.structure(exclusive=False):
            for object_id, file in by_id.items():
                if object_id in opened:
                    continue
                key = file.content_key(self._manifest.uri, self._manifest.algorithm)
                spec = ObjectSpec(object_id, key, file.grid, self._manifest.algorithm)
                folder = self._domain.object(object_id)
                objects.create(spec, folder, self._store.tmp)
                try:
                    writer = ObjectWriter(folder, spec)
                except (StoreError, FileNotFoundError):
                    if folder.complete:
                        raise
                    damaged.append((folder, folder.path.stat()))
                    continue
                self._all.append(Filling(file, writer))
                self._progress.present += writer.present_bytes()
        return damaged

    def _reserve_space(self) -> None:
        """Know before anything is fetched whether all of it will fit."""
        needed = sum(f.writer.unallocated_bytes for f in self._open)
        free = disk.free_bytes(self._store.root) - self._limits.reserve
        if needed > max(0, free):
            raise NoSpace("", missing=needed - free)
        for filling in self._open:
            filling.writer.allocate()

    def _how_much_is_missing(self, error: NoSpace) -> NoSpace:
        missing = error.missing
        if not missing:
            left = sum(f.size for f in self._manifest.files) - self._progress.done
            # Room for the bytes may be taken already: then it was the folders and links that found none.
            missing = max(_MARGIN, left + self._limits.reserve - disk.free_bytes(self._store.root))
        return NoSpace(
            f"the store {str(self._store.root)!r} has too little space for {self._manifest.uri}: {missing} bytes are "
            f"missing; free them with `headrace gc`, or choose another disk with --root.",
            missing,
        )

    def _look_around(self) -> None:
        """Take what is on this disk already, and the headers that resolving has read."""
        for filling in self._all:
            writer = filling.writer
            if not writer.full and reuse.adopt_twin(self._domain, filling.file, writer, self._go_on):
                self._progress.add("local", filling.file.size, len(filling.file.grid))
        for filling in self._all:
            filling.complete = filling.writer.complete
        self._open = [f for f in self._all if not f.complete]
        self._reserve_space()
        for filling in self._open:
            self._use_header(filling)
        if any(f.file.chunks is not None for f in self._open):
            self._local = reuse.LocalChunks(self._domain, self._manifest.algorithm)

    def _use_header(self, filling: Filling) -> None:
        """The header chunk, which was read to find the grid, is not read again."""
        head = self._headers.get(filling.file.path)
        grid = filling.file.grid
        if head is None or filling.file.chunks is not None:
            return
        # A header longer than a chunk covers several; only whole ones are of use.
        last = sum(1 for end in grid.offsets[1:] if end <= len(head))
        for index in range(last):
            if filling.writer.claim(index, index + 1):
                sink = ChunkSink(filling, index, self._progress, "origin")
                sink.put(memoryview(head)[slice(*grid.span(index, index + 1))])
                filling.writer.release(index, index + 1)

    # -- filling

    async def _fill(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                watch = group.create_task(self._watch())
                bringing = self._bringing()
                bringing.begin(group)
                while self._open:
                    self._finish_full()
                    if any(not f.full for f in self._open):
                        # Also after a failed sync has returned chunks to absent.
                        bringing.go_on()
                    await asyncio.sleep(_TICK)
                await bringing.end()
                watch.cancel()
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from None

    def _bringing(self) -> Bringing:
        origin = OriginSource(self._origin)
        local = None if self._local is None else LocalSource(self._local)
        pools = Pools(self._writing, self._syncing, self._cancelled.set)
        if self._cluster is None:
            return Fetching(
                lambda: self._open,
                [origin] if local is None else [local, origin],
                self._progress,
                pools,
                uri=self._manifest.uri,
                span=self._limits.span,
                connections=self._limits.connections,
                pace=self._pace,
            )
        # Alone, nothing of the cluster is imported.
        from headrace.cache.swarm import Swarming
        from headrace.cache.transfers import Content

        content = Content(
            self._domain.name,
            self._manifest.uri,
            Numbering.of(self._manifest, self._domain.name),
            {f.writer.spec.id: f for f in self._all},
            origin,
            local,
            self._progress,
            pools,
            self._pace or Pace(),
            self._limits.span,
        )
        return Swarming(self._cluster, self._domain, self._manifest, content)

    async def _watch(self) -> None:
        """Notice what other stagers of this node bring."""
        while True:
            await asyncio.sleep(_SAMPLE)
            for filling in self._open:
                filling.elsewhere = filling.writer.complete
            own = sum(self._progress.fetched.values())
            self._progress.present = sum(f.writer.present_bytes() for f in self._all) - own

    # -- completing

    def _finish_full(self) -> None:
        """Settle what is full; complete everything at the end, so that no sync slows the bytes that still come."""
        self._open = [f for f in self._open if not f.done]
        for filling in self._open:
            if filling.full and not filling.flying and not filling.settled:
                filling.settled = True
                self._group.create_task(self._settle(filling))
            elif filling.settled and not filling.full and not filling.completing:
                # A failed sync or a repair took chunks back.
                filling.settled = filling.checked = False
                filling.writer.join()
        if self._open and all(f.checked for f in self._open):
            self._progress.phase = "completing"
            for filling in self._open:
                if not filling.completing:
                    filling.completing = True
                    self._group.create_task(self._complete(filling))

    async def _settle(self, filling: Filling) -> None:
        # Another stager that has everything may complete it meanwhile.
        filling.writer.leave()
        if filling.file.digest is not None and filling.file.chunks is None:
            await self._in_thread(self._check_whole, filling)
        filling.checked = filling.settled

    async def _complete(self, filling: Filling) -> None:
        writer, file = filling.writer, filling.file
        delay = _POLL_FIRST
        while not await self._in_thread(writer.try_complete):
            if not filling.full:
                filling.completing = filling.settled = filling.checked = False
                return
            await asyncio.sleep(delay)
            delay = min(delay * 2, _POLL_MOST)
        if file.digest is None and file.chunks is None:
            await self._in_thread(self._share, filling)
        filling.done = True

    def _check_whole(self, filling: Filling) -> None:
        """The publisher's digest of the whole file, where there are no chunk digests."""
        state = hashlib.sha256()
        for start in range(0, filling.file.size, 8 << 20):
            self._go_on()
            state.update(os.pread(filling.writer.fileno(), 8 << 20, start))
        if f"sha256:{state.hexdigest()}" == filling.file.digest:
            return
        for index in range(len(filling.file.grid)):
            filling.writer.map.mark(index, ABSENT)
        raise IntegrityError(
            f"{self._manifest.uri}/{filling.file.path} does not have the sha256 digest that its origin publishes: "
            f"nothing of it was kept; stage again, and if that fails again, the origin serves wrong bytes."
        )

    def _share(self, filling: Filling) -> None:
        """The same bytes under another URI become the same inode."""
        writer = filling.writer
        other = reuse.equal_object(self._domain, writer.folder, writer.spec, self._go_on)
        if other is not None:
            objects.share(writer.folder, other)


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error that a user should see of those that ended together: ours before foreign ones."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            flat.append(error)
    return next((e for e in flat if isinstance(e, HeadraceError)), flat[0])
