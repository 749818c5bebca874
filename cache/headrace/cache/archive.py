"""Archives (`.tar`, `.tar.gz`): staged as an ordinary object, extracted into a derived snapshot.

Nothing that an archive says is believed: members are written under numbers into a folder of `tmp/`,
and get their names as links only when the whole archive was read to its end, is within its limits,
and every path in it is safe. The archive's own bytes were verified when it was staged, so its members
are as good; their digests are computed here, and make them one object with the same file from elsewhere.

Crash story. While extracting, a crash leaves a folder in `tmp/`, swept later. The derived snapshot is
made and held first, then its objects, each complete at once, then its links, last its names: a crash
between leaves an incomplete snapshot that the next run, extracting again, completes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.cache import disk, selection
from headrace.cache import object as objects
from headrace.cache.describe import describe
from headrace.cache.errors import ArchiveError, Interrupted, NoSpace, NotStaged
from headrace.cache.grid import DEFAULT_CHUNK
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectSpec
from headrace.cache.paths import check_size, check_tree
from headrace.cache.selection import ARCHIVES, Skipped
from headrace.cache.snapshot import Selection, Snapshot
from headrace.cache.store import Domain, Store
from headrace.cache.tarball import ArchiveLimits, Unpacked, copy_member, members

# A snapshot that came out of an archive is also named by this and the archive's snapshot.
DERIVED = "archive:"
_THREADS = 4
_HOLD_TRIES = 10


@dataclass(frozen=True, slots=True)
class Derived:
    """The snapshot of an archive's members, and the members that were left out."""

    snapshot: Snapshot
    manifest: Manifest
    skipped: tuple[Skipped, ...] = ()


def is_archive(manifest: Manifest) -> bool:
    """Whether a snapshot is one archive and nothing else; what came out of one never is."""
    files = manifest.files
    return len(files) == 1 and files[0].path.endswith(ARCHIVES) and files[0].pin is not None


def find(domain: Domain, archive: Snapshot, name: str, wanted: Selection) -> Derived | None:
    """What was derived from this archive before, if it is still here; remembered as `name` again."""
    found = domain.resolved(_derived_name(archive), wanted, complete=True)
    if found is None:
        return None
    snapshot = found[0]
    hold = snapshot.hold()
    if hold is None:  # being evicted
        return None
    try:
        snapshot.touch_used()
        snapshot.add_name(name, wanted)
        return Derived(snapshot, snapshot.manifest())
    finally:
        os.close(hold)


async def derive(
    store: Store,
    domain: Domain,
    archive: Snapshot,
    manifest: Manifest,
    name: str,
    wanted: Selection,
    *,
    chunk: int = DEFAULT_CHUNK,
    limits: ArchiveLimits | None = None,
) -> Derived:
    """Extract a complete archive into a snapshot of its own, in a thread; cancelling stops it at once.

    Args:
        manifest: of the archive's snapshot.
        name: the reference that the derived snapshot is remembered by.
        wanted: which members.

    Raises:
        ArchiveError: no such archive, damaged, over its limits, or with links, devices, sparse files.
        UnsafePath: paths that must not be written.
        CheckpointError: a member is called safetensors and is not.
        NoSpace, StoreError: the store cannot take it.
    """
    stop = threading.Event()
    work = _Derivation(store, domain, archive, manifest, wanted, chunk, limits or ArchiveLimits(), stop)
    job = asyncio.ensure_future(asyncio.to_thread(work.run, name))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        # The store must not be closed below a thread that still writes to it.
        stop.set()
        await asyncio.gather(job, return_exceptions=True)
        raise


def _derived_name(archive: Snapshot) -> str:
    return f"{DERIVED}{archive.id}"


@dataclass(frozen=True, slots=True)
class _Extracted:
    """A member's bytes in `tmp/`."""

    path: str
    size: int
    file: Path


@dataclass(frozen=True, slots=True)
class _Derivation:
    """One archive on its way into the store."""

    store: Store
    domain: Domain
    archive: Snapshot
    manifest: Manifest
    wanted: Selection
    chunk: int
    limits: ArchiveLimits
    stop: threading.Event

    @property
    def where(self) -> str:
        return f"{self.manifest.uri or self.archive.id} ({self.manifest.files[0].path})"

    def run(self, name: str) -> Derived:
        folder = self.store.tmp / f"archive-{uuid.uuid4().hex}"
        with disk.translate(self.archive.path, "extracting an archive"):
            folder.mkdir(mode=0o700)
            try:
                extracted, skipped = self._extract(folder)
                if not extracted:
                    why = f": {skipped[0].path}: {skipped[0].why}" if skipped else ""
                    raise ArchiveError(f"{self.where} holds no files to stage{why}; check the patterns.")
                with ThreadPoolExecutor(_THREADS, "headrace-archive") as pool:
                    entries = tuple(pool.map(self._describe, extracted))
                derived = self._keep(entries, extracted, name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return replace(derived, skipped=tuple(skipped))

    def check(self) -> None:
        if self.stop.is_set():
            raise Interrupted(
                "extracting was interrupted; the archive is kept, and the next run extracts it."
            )

    def _extract(self, folder: Path) -> tuple[list[_Extracted], list[Skipped]]:
        """Every wanted member, sorted by path; only when the whole archive was read without complaint."""
        found: list[_Extracted] = []
        folders: set[str] = set()
        left_out: list[Skipped] = []
        (archive,) = self.domain.object_files(self.manifest).values()
        with Unpacked(open(archive, "rb"), self.where, self.limits) as stream:
            for path, member, content in members(stream, self.where, self.limits, self.check):
                if member.isdir():
                    folders.add(path)
                    continue
                check_size(path, member.size, self.where)
                _, skipped = selection.select([(path, member.size)], self.wanted)
                left_out += skipped
                if skipped:
                    continue
                file = folder / str(len(found))
                self._check_space(member.size)
                copy_member(content, file, member, self.where, self.check)
                found.append(_Extracted(path, member.size, file))
        check_tree([*(e.path for e in found), *(s.path for s in left_out)], self.where)
        if both := folders.intersection(e.path for e in found):
            raise ArchiveError(f"{self.where} names {min(both)!r} both as a file and as a folder.")
        kept, more = selection.select([(e.path, e.size) for e in found], self.wanted)
        chosen = set(kept)
        for extracted in found:
            if extracted.path not in chosen:
                extracted.file.unlink()
        ordered = sorted((e for e in found if e.path in chosen), key=lambda e: e.path)
        return ordered, left_out + more

    def _check_space(self, size: int) -> None:
        free = disk.free_bytes(self.store.root) - self.limits.reserve
        if size > free:
            raise NoSpace(
                f"the store {str(self.store.root)!r} has too little space to unpack {self.where}: at least "
                f"{size - free} bytes are missing; free them with `headrace gc`, or choose another disk with --root.",
                size - free,
            )

    def _describe(self, extracted: _Extracted) -> ManifestFile:
        fd = os.open(extracted.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return describe(
                fd,
                extracted.path,
                where=f"{self.where}: {extracted.path}",
                chunk=self.chunk,
                algorithm=self.manifest.algorithm,
                check=self.check,
            )
        finally:
            os.close(fd)

    def _keep(self, entries: tuple[ManifestFile, ...], extracted: list[_Extracted], name: str) -> Derived:
        """Make objects and snapshot of what was extracted."""
        manifest = Manifest(
            entries,
            self.manifest.algorithm,
            self.manifest.published,
            uri=self.manifest.uri,
            revision=self.manifest.revision,
            signed_by=self.manifest.signed_by,
        )
        snapshot, hold = self._held_snapshot(manifest)
        try:
            stored = snapshot.manifest()
            if snapshot.complete and self.domain.has_objects(stored):
                manifest = stored  # the same files, staged from elsewhere, perhaps cut otherwise
            else:
                self._fill(snapshot, manifest, extracted)
                if self.domain.object_files(stored) == self.domain.object_files(manifest):
                    manifest = stored
                else:
                    snapshot.replace_manifest(manifest)
            snapshot.touch_used()
            snapshot.add_name(_derived_name(self.archive), self.wanted)
            snapshot.add_name(name, self.wanted)
        finally:
            os.close(hold)
        return Derived(snapshot, manifest)

    def _fill(self, snapshot: Snapshot, manifest: Manifest, extracted: list[_Extracted]) -> None:
        with self.store.structure(exclusive=False):
            for entry, source in zip(manifest.files, extracted, strict=True):
                object_id = manifest.object_id(self.domain.name, entry)
                key = entry.content_key(manifest.uri, manifest.algorithm)
                spec = ObjectSpec(object_id, key, entry.grid, manifest.algorithm)
                digests = [bytes.fromhex(chunk) for chunk in entry.chunks or ()]
                folder = self.domain.object(object_id)
                objects.create_complete(spec, folder, self.store.tmp, source.file, digests)
            files = self.domain.object_files(manifest)
            snapshot.link(files, self.store.tmp)
            snapshot.relink(files)

    def _held_snapshot(self, manifest: Manifest) -> tuple[Snapshot, int]:
        for _ in range(_HOLD_TRIES):
            snapshot = self.domain.make_snapshot(manifest, self.store.tmp)
            hold = snapshot.hold()
            if hold is not None:
                return snapshot, hold
        raise NotStaged(f"{self.where} is being evicted again and again: stop `headrace gc` meanwhile.")
