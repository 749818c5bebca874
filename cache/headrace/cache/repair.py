"""Repair: fetch just the bad chunks of a snapshot into a new inode, and show that instead.

A published inode is never written again (design: invariant 7). For each object with bad chunks, under
its exclusive lock: `partial` is made beside `data` (blocks shared, or the good chunks copied), the bad
chunks are fetched from equal chunks on this disk or from the origin, every chunk of `partial` is hashed
again, synced, renamed over `data`; then every snapshot's link is replaced by link + rename.

Crash story. Before the rename `data` is as it was and `partial` is scratch that the next repair or
collection removes. After it `data` is right and a link may still show the old inode: `verify` names
such a link, and the next repair or stage of that snapshot replaces it. Each link is replaced by one
rename, so a path always shows the old file or the new one, whole. Who has the old inode open or mapped
keeps reading old bytes; the report lists them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from headrace.cache import clone, disk
from headrace.cache import object as objects
from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.digest import chunk_digest
from headrace.cache.durable import sync_dir
from headrace.cache.errors import Held, IntegrityError, NotStaged
from headrace.cache.holders import Holder, Holders, holders_of
from headrace.cache.learned import LearnedDigests
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder
from headrace.cache.origins.options import OriginOptions
from headrace.cache.rebuild import rebuild
from headrace.cache.salvage import ChunkFinder
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain, Store
from headrace.cache.verify import VerifyReport, chunk_digests, known_digests, sha256_of, verify

_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class RepairedChunk:
    """A chunk that is right again, and where its bytes came from: "local" or "origin"."""

    path: str
    index: int
    bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was done.

    Attributes:
        chunks: fetched and right again.
        rebuilt: paths whose whole object was made again.
        withdrawn: (path, chunk) of incomplete objects: the next `stage` fetches them.
        relinked: (snapshot id, path) of links that show the new inode now.
        holders: who still reads old bytes, as far as this user may see.
        sources: bytes by where they came from.
    """

    snapshot: str
    chunks: tuple[RepairedChunk, ...]
    rebuilt: tuple[str, ...]
    withdrawn: tuple[tuple[str, int], ...]
    relinked: tuple[tuple[str, str], ...]
    holders: Holders
    sources: dict[str, int]


@dataclass
class _Work:
    """What a repair has done so far. `old` are the inodes that were replaced: (st_dev, st_ino)."""

    chunks: list[RepairedChunk] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    withdrawn: list[tuple[str, int]] = field(default_factory=list)
    relinked: list[tuple[str, str]] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    old: set[tuple[int, int]] = field(default_factory=set)
    sources: dict[str, int] = field(default_factory=lambda: {"origin": 0, "peer": 0, "local": 0})


def repair(
    store: Store,
    domain: Domain,
    snapshot: Snapshot,
    *,
    report: VerifyReport | None = None,
    options: OriginOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> RepairReport:
    """Make a snapshot right again.

    Args:
        report: of `verify`; None verifies first.
        options: of the origin; None takes the configuration's.
        progress: called with the bytes just read or fetched, from any thread.

    Raises:
        NotStaged: there is no such snapshot.
        Held: stagers have an object open; repeat later.
        OriginError: the bytes are nowhere on this disk, and the origin lacks them or has changed;
            the file stays as it was.
        NoSpace: says how much is missing.
    """
    hold = snapshot.hold()
    if hold is None:
        raise NotStaged(f"the snapshot {snapshot.id[:12]} is not in this store: stage it.")
    pool = ThreadPoolExecutor(_AT_ONCE, "headrace-repair")
    try:
        found = report or verify(store, domain, snapshot, progress=progress)
        with disk.translate(snapshot.path, "repairing"):
            work = _Work()
            run = _Repair(store, domain, snapshot, pool, progress or (lambda _: None), work)
            try:
                asyncio.run(run.run(found, options))
            finally:
                # Also when it ended early: what is right already is to be seen.
                _relink(domain, snapshot, work)
        return RepairReport(
            snapshot.id,
            tuple(work.chunks),
            tuple(work.rebuilt),
            tuple(work.withdrawn),
            tuple(work.relinked),
            _still_reading(work),
            work.sources,
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        os.close(hold)


class _Repair:
    """One run over one snapshot."""

    def __init__(
        self,
        store: Store,
        domain: Domain,
        snapshot: Snapshot,
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None],
        work: _Work,
    ) -> None:
        self._store = store
        self._domain = domain
        self._snapshot = snapshot
        self._content: Manifest = snapshot.manifest()
        self._pool = pool
        self._progress = progress
        self._work = work

    async def run(self, found: VerifyReport, options: OriginOptions | None) -> None:
        broken = {d.path for d in found.damaged if d.kind == "object"}
        whole = {d.path for d in found.damaged if d.kind in ("digest", "size")}
        chunks: dict[str, set[int]] = {path: set() for path in whole}
        for bad in found.bad:
            chunks.setdefault(bad.path, set()).add(bad.index)
        if broken:
            await rebuild(self._store, self._domain, self._snapshot, broken, options)
            self._work.rebuilt += sorted(broken)
            self._work.changed |= {self._object_id(path) for path in broken}
        done: set[str] = set()
        async with ChunkFinder(self._domain, self._snapshot, self._content, options) as finder:
            for path in sorted(chunks):
                object_id = self._object_id(path)
                if path in broken or object_id in done:
                    continue
                done.add(object_id)
                file = self._content.by_path[path]
                all_of_it = any(d.path == path and d.kind == "digest" for d in found.damaged)
                bad_chunks = range(len(file.grid)) if all_of_it else sorted(chunks[path])
                await self._repair_object(file, self._domain.object(object_id), bad_chunks, finder)

    def _object_id(self, path: str) -> str:
        return self._content.object_id(self._domain.name, self._content.by_path[path])

    async def _repair_object(
        self, file: ManifestFile, folder: ObjectFolder, bad: Sequence[int], finder: ChunkFinder
    ) -> None:
        lock = objects.lock_exclusively(folder, "repairing it")
        try:
            if not folder.complete:
                self._withdraw(file, folder, bad)
                return
            old = folder.data.stat()
            was = (old.st_dev, old.st_ino)
            twins = [o for o in self._domain.objects() if o.id != folder.id and was in _inode(o.data)]
            finder.distrust({folder.id, *(t.id for t in twins)})
            folder.partial.unlink(missing_ok=True)
            try:
                await self._fill(file, folder, bad, finder)
                os.rename(folder.partial, folder.data)
            except BaseException:
                folder.partial.unlink(missing_ok=True)
                raise
            sync_dir(folder.path)
            self._work.old.add(was)
            self._work.changed.add(folder.id)
        finally:
            os.close(lock)
        with ChunkMap.open(folder.map, writable=True) as chunk_map:
            chunk_map.promote(list(range(chunk_map.count)))
            chunk_map.set_verified()
            chunk_map.sync()
        self._share(folder, twins)

    def _withdraw(self, file: ManifestFile, folder: ObjectFolder, bad: Sequence[int]) -> None:
        """Chunks of an object that is not complete yet are fetched by whoever stages it."""
        with ChunkMap.open(folder.map, writable=True) as chunk_map:
            for index in bad:
                chunk_map.mark(index, ABSENT)
                self._work.withdrawn.append((file.path, index))
            chunk_map.sync()

    async def _fill(
        self, file: ManifestFile, folder: ObjectFolder, bad: Sequence[int], finder: ChunkFinder
    ) -> None:
        """Make `partial` right: good chunks copied, bad ones fetched, all hashed, synced, final mode."""
        expected = list(known_digests(folder, file))
        source = os.open(folder.data, os.O_RDONLY | os.O_CLOEXEC)
        target = os.open(folder.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._copy_good(file, folder, bad, source, target)
            for start in range(0, len(bad), _AT_ONCE):
                batch = [
                    self._fetch(file, i, expected, finder, target) for i in bad[start : start + _AT_ONCE]
                ]
                # All end before the first failure is raised: none may write into a closed descriptor.
                for outcome in await asyncio.gather(*batch, return_exceptions=True):
                    if outcome is not None:
                        raise outcome
            os.fsync(target)
            self._check(file, folder, expected)
            os.fchmod(target, 0o444)
            os.fsync(target)
        finally:
            os.close(source)
            os.close(target)

    def _copy_good(
        self, file: ManifestFile, folder: ObjectFolder, bad: Sequence[int], source: int, target: int
    ) -> None:
        if clone.reflink(source, target):
            os.ftruncate(target, file.size)
            return
        clone.check_room(folder.path, file.size, f"the repair of {file.path}")
        disk.allocate(target, file.size)
        replaced = set(bad)
        for index in range(len(file.grid)):
            if index not in replaced:
                clone.copy_range(source, target, *file.grid.span(index, index + 1))

    async def _fetch(
        self,
        file: ManifestFile,
        index: int,
        expected: list[bytes | None],
        finder: ChunkFinder,
        target: int,
    ) -> None:
        data, source = await finder.find(file, index, expected[index])
        start, _ = file.grid.span(index, index + 1)
        view = memoryview(data)
        while view:
            written = os.pwrite(target, view, start)
            view, start = view[written:], start + written
        # What no digest was known for is pinned to what was just read, as on the first read.
        expected[index] = expected[index] or chunk_digest(self._content.algorithm, data)
        self._work.chunks.append(RepairedChunk(file.path, index, len(data), source))
        self._work.sources[source] += len(data)
        self._progress(len(data))

    def _check(self, file: ManifestFile, folder: ObjectFolder, expected: Sequence[bytes | None]) -> None:
        """Hash all of `partial`, and learn the digests that were unknown."""
        found = chunk_digests(
            folder.partial,
            file.grid,
            self._content.algorithm,
            range(len(file.grid)),
            self._pool,
            self._progress,
        )
        for index, digest in enumerate(expected):
            if isinstance(found[index], str) or (digest is not None and found[index] != digest):
                raise IntegrityError(
                    f"chunk {index} of {file.path!r} is still wrong after its repair; the old file was kept: "
                    f"repeat it, and if that fails again, check the disk."
                )
        if file.digest is not None and file.chunks is None and sha256_of(folder.partial) != file.digest:
            raise IntegrityError(
                f"{file.path!r} still does not have its sha256 digest after its repair: the origin serves other "
                f"bytes now; the old file was kept."
            )
        learned = LearnedDigests(folder.digests, writable=True)
        try:
            for index, learnt in found.items():
                assert isinstance(learnt, bytes)
                learned.put(index, learnt)
            learned.sync()
        finally:
            learned.close()

    def _share(self, folder: ObjectFolder, twins: Sequence[ObjectFolder]) -> None:
        """Other objects that were the same bad inode become the new one."""
        for twin in twins:
            if not objects.share(twin, folder):
                raise Held(
                    f"the object {twin.id[:12]} shares the bad bytes and is being staged, so it is not repaired yet: "
                    f"repeat `headrace verify --repair` later."
                )
            self._work.changed.add(twin.id)


def _relink(domain: Domain, repaired: Snapshot, work: _Work) -> None:
    """Every link to a replaced inode, in every snapshot of the domain, and all of the repaired one's."""
    for snapshot in domain.snapshots():
        if not snapshot.complete or not (work.changed or snapshot.id == repaired.id):
            continue
        hold = snapshot.hold()
        if hold is None:
            continue
        try:
            content = snapshot.manifest()
            data = {}
            for file in content.files:
                folder = domain.object(content.object_id(domain.name, file))
                if (folder.id in work.changed or snapshot.id == repaired.id) and folder.complete:
                    data[file.path] = folder.data
                    work.old |= _inode(snapshot.files / file.path) - _inode(folder.data)
            work.relinked += [(snapshot.id, path) for path in snapshot.relink(data)]
        finally:
            os.close(hold)


def _inode(path: Path) -> set[tuple[int, int]]:
    """(st_dev, st_ino), or nothing where no file is."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {(status.st_dev, status.st_ino)}


def _still_reading(work: _Work) -> Holders:
    found: list[Holder] = []
    hidden = 0
    for device, inode in sorted(work.old):
        seen = holders_of(device, inode)
        found += seen.found
        hidden = max(hidden, seen.hidden)
    return Holders(tuple(dict.fromkeys(found)), hidden)
