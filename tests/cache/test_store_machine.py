"""A store driven by random steps beside a simple model of it: a dictionary of snapshots to bytes."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.models import CHUNK, PATIENT, published
from support.stores import flip, opened, read_files, write_files

from headrace.cache.chunkmap import ChunkMap
from headrace.cache.errors import Held, IntegrityError, Interrupted, OriginError
from headrace.cache.evict import collect, pin, remove, unpin, usage
from headrace.cache.object import ObjectFolder, read_exactly
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.repair import repair
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StageReport, StagingJob
from headrace.cache.store import Store
from headrace.cache.verify import verify

# One is staged from its listing, one from a published manifest.
LISTED, PUBLISHED = "listed", "published"
COMMON = random.Random(0).randbytes(2 * CHUNK + 100)
names = st.sampled_from([LISTED, PUBLISHED])
picks = st.integers(0, 1 << 16)


def revision(name: str, number: int) -> dict[str, bytes]:
    """The files of one revision: a shared one, one that changes in part, one that changes whole."""
    weights = bytearray(random.Random(name).randbytes(3 * CHUNK + 5))
    weights[CHUNK : CHUNK + 8] = number.to_bytes(8, "big")
    return {
        "common.bin": COMMON,
        "sub/weights.bin": bytes(weights),
        "config.json": b'{"revision": %d, "of": "%s"}' % (number, name.encode()),
    }


class EndAfter(Progress):
    """Ends staging when some chunks were marked: by an interruption, or by killing the process."""

    def __init__(self, chunks: int, *, kill: bool) -> None:
        super().__init__()
        self._limit, self._kill = chunks, kill

    def add(self, source: str, size: int, chunks: int = 1) -> None:
        super().add(source, size, chunks)
        if self.chunks >= self._limit:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted("enough")


@dataclass
class Reader:
    """Someone with a snapshot open: a hold, and a map of one file as it was."""

    snapshot: str
    hold: int
    view: mmap.mmap
    seen: bytes

    def close(self) -> None:
        self.view.close()
        os.close(self.hold)


@dataclass
class Model:
    """What the store has to show: bytes by path, by snapshot; who keeps it; what the test spoiled."""

    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    # Offsets of flipped bytes, by inode.
    spoiled: dict[int, set[int]] = field(default_factory=dict)

    @property
    def kept(self) -> set[str]:
        return self.pinned | {reader.snapshot for reader in self.readers}


class StoreMachine(RuleBasedStateMachine):
    """No rule is enabled by what a race may decide otherwise next time: what does not fit does nothing."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        # Thousands of syncs: where there is a file system in memory, there.
        self.top = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.root = self.top / "store"
        self.model = Model()
        self.numbers = {LISTED: 0, PUBLISHED: 0}
        self.truth: list[bytes] = []

    @initialize()
    def begin(self) -> None:
        Store.open(self.root).close()
        for name in self.numbers:
            self._publish(name)

    def teardown(self) -> None:
        for reader in self.model.readers:
            reader.close()
        shutil.rmtree(self.top)

    def _publish(self, name: str) -> None:
        files = revision(name, self.numbers[name])
        self.truth += files.values()
        write_files(self.top / name, published(files) if name == PUBLISHED else files)

    def _job(self, name: str, progress: Progress | None = None) -> StagingJob:
        limits = StagerLimits(span=CHUNK, connections=2, reserve=0)
        reference = str(self.top / name)
        return StagingJob(
            StageRequest(
                reference, str(self.root), "default", workers=1, chunk=CHUNK, limits=limits, options=PATIENT
            ),
            progress,
        )

    def _staged(self, name: str, report: StageReport) -> None:
        self.model.snapshots[report.snapshot] = revision(name, self.numbers[name])

    def _pick(self, number: int) -> str:
        return sorted(self.model.snapshots)[number % len(self.model.snapshots)]

    def _forget(self, snapshot: str) -> None:
        self.model.snapshots.pop(snapshot, None)
        self.model.pinned.discard(snapshot)
        self._prune()

    def _prune(self) -> None:
        """Inodes that are gone from the store; their numbers may come back as other files."""
        there = {path.stat().st_ino for path in self.root.rglob("*") if path.is_file()}
        self.model.spoiled = {i: o for i, o in self.model.spoiled.items() if i in there and o}

    # -- staging

    @rule(name=names)
    def stage(self, name: str) -> None:
        self._staged(name, self._job(name).start().wait())

    @rule(name=names)
    def two_stage_at_once(self, name: str) -> None:
        jobs = [self._job(name).start() for _ in range(2)]
        reports = [job.wait() for job in jobs]
        assert reports[0].snapshot == reports[1].snapshot
        self._staged(name, reports[0])

    @rule(name=names, chunks=st.integers(1, 6))
    def interrupt_staging(self, name: str, chunks: int) -> None:
        with suppress(Interrupted):
            self._staged(name, self._job(name, EndAfter(chunks, kill=False)).start().wait())

    @rule(name=names, chunks=st.integers(1, 6))
    def kill_while_staging(self, name: str, chunks: int) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self._job(name, EndAfter(chunks, kill=True)).start().wait()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            # What it had linked by then, it had linked whole; the next look finds out.
            return
        assert os.waitstatus_to_exitcode(status) == 0
        self.stage(name)

    @rule(name=names)
    def publish_a_new_revision(self, name: str) -> None:
        self.numbers[name] += 1
        self._publish(name)

    # -- keeping

    @rule(pick=picks)
    def pin_or_unpin(self, pick: int) -> None:
        if not self.model.snapshots:
            return
        snapshot = self._pick(pick)
        with opened(self.root, snapshot) as it:
            if snapshot in self.model.pinned:
                unpin(it.snapshot)
                self.model.pinned.discard(snapshot)
            else:
                pin(it.snapshot, "by the test")
                self.model.pinned.add(snapshot)
        if snapshot in self.model.kept:
            self.remove_one(pick)

    @rule(pick=picks)
    def open_for_reading(self, pick: int) -> None:
        if not self.model.snapshots or len(self.model.readers) > 2:
            return
        snapshot = self._pick(pick)
        with opened(self.root, snapshot, writable=False) as it:
            hold = it.snapshot.hold()
            assert hold is not None
            with open(it.link("sub/weights.bin"), "rb") as file:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.model.readers.append(Reader(snapshot, hold, view, view[:]))
        self.remove_one(pick)

    @rule(pick=picks)
    def close_reader(self, pick: int) -> None:
        if not self.model.readers:
            return
        self.model.readers.pop(pick % len(self.model.readers)).close()

    # -- evicting

    # Also tried whenever something was just pinned or opened, as chance rarely does.
    @rule(pick=picks)
    def remove_one(self, pick: int) -> None:
        if not self.model.snapshots:
            return
        snapshot = self._pick(pick)
        with opened(self.root, snapshot) as it:
            try:
                remove(it.store, it.domain, it.snapshot)
                gone = True
            except Held:
                gone = False
        assert gone == (snapshot not in self.model.kept)
        if gone:
            self._forget(snapshot)

    @rule(share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), all_leftovers=st.booleans())
    def collect_garbage(self, share: float, all_leftovers: bool) -> None:
        with Store.open(self.root) as store:
            limit = int(usage(store) * share)
            report = collect(store, max_bytes=limit, leftover_age=-1 if all_leftovers else 3600)
            assert report.after == usage(store)
            assert report.after <= limit or report.excess > 0
        removed = {r.id for r in report.removed if r.kind == "snapshot"}
        assert not removed & self.model.kept
        if report.excess:
            # Nothing that may go was kept.
            assert set(self.model.snapshots) - removed <= self.model.kept
        for snapshot in removed:
            self._forget(snapshot)

    # -- spoiling and mending

    @rule(pick=picks, path=st.sampled_from(["common.bin", "sub/weights.bin", "config.json"]), at=picks)
    def spoil_a_byte(self, pick: int, path: str, at: int) -> None:
        if not self.model.snapshots:
            return
        with opened(self.root, self._pick(pick)) as it:
            link = it.link(path)
            offset = at % link.stat().st_size
            flip(link, offset)
            self.model.spoiled.setdefault(link.stat().st_ino, set()).symmetric_difference_update({offset})
        for reader in self.model.readers:
            # The disk failed under their eyes; from here on they see what they see.
            reader.seen = reader.view[:]

    def _spoiled_chunks(self, snapshot: str) -> set[tuple[str, int]]:
        with opened(self.root, snapshot) as it:
            content = it.snapshot.manifest()
            return {
                (file.path, file.grid.covering(offset, offset + 1)[0])
                for file in content.files
                for offset in self.model.spoiled.get(it.link(file.path).stat().st_ino, ())
            }

    @rule(pick=picks)
    def verify_one(self, pick: int) -> None:
        if not self.model.snapshots:
            return
        snapshot = self._pick(pick)
        with opened(self.root, snapshot) as it:
            report = verify(it.store, it.domain, it.snapshot)
        assert {(b.path, b.index) for b in report.bad} == self._spoiled_chunks(snapshot)
        assert report.damaged == ()
        assert report.unknown == ()
        assert report.complete

    @rule(pick=picks)
    def repair_one(self, pick: int) -> None:
        if not self.model.snapshots:
            return
        snapshot = self._pick(pick)
        before = self._spoiled_chunks(snapshot)
        with opened(self.root, snapshot) as it:
            try:
                repair(it.store, it.domain, it.snapshot, options=PATIENT)
                error = None
            except (OriginError, IntegrityError) as caught:
                error = caught
            self._prune()
            if error is None:
                assert verify(it.store, it.domain, it.snapshot).ok
                assert self._spoiled_chunks(snapshot) == set()
            else:
                # Only what the origin no longer has may stay spoiled.
                now = read_files(self.top / it.snapshot.manifest().uri.rpartition("/")[2])  # type: ignore[union-attr]
                assert any(now.get(p) != self.model.snapshots[snapshot][p] for p, _ in before)
        for reader in self.model.readers:
            assert reader.view[:] == reader.seen

    # -- what always holds

    @invariant()
    def every_visible_file_is_whole_and_right(self) -> None:
        if not self.root.exists():
            return
        shown = {path.parent.name: path for path in self.root.glob("domains/*/snapshots/*/files")}
        for snapshot, folder in shown.items():
            expected = self.model.snapshots.get(snapshot)
            if expected is None:
                # A killed stager had just linked it: then it is all there.
                expected = self.model.snapshots[snapshot] = self._find_revision(folder)
            assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(expected)
            for path, data in expected.items():
                found = bytearray((folder / path).read_bytes())
                for offset in self.model.spoiled.get((folder / path).stat().st_ino, ()):
                    found[offset] ^= 0xFF
                assert found == data, f"{path} of {snapshot}"
        assert set(self.model.snapshots) == set(shown)

    def _find_revision(self, folder: Path) -> dict[str, bytes]:
        for name, last in self.numbers.items():
            for number in range(last + 1):
                if (folder / "config.json").read_bytes() == revision(name, number)["config.json"]:
                    return revision(name, number)
        raise AssertionError(f"{folder} shows what was never published")

    @invariant()
    def nothing_kept_is_gone(self) -> None:
        assert self.model.kept <= set(self.model.snapshots)

    @invariant()
    def every_mark_is_true(self) -> None:
        for entry in self.root.glob("domains/*/objects/*"):
            folder = ObjectFolder(entry)
            path = folder.data if folder.complete else folder.partial
            if path.stat().st_ino in self.model.spoiled:
                continue
            spec = folder.spec()
            candidates = [data for data in self.truth if len(data) == spec.size]
            with ChunkMap.open(folder.map, writable=False) as chunk_map, open(path, "rb") as file:
                for index in range(len(spec.grid)):
                    if folder.complete or chunk_map.ready(index, index + 1):
                        start, stop = spec.grid.span(index, index + 1)
                        found = read_exactly(file.fileno(), start, stop)
                        assert any(found == data[start:stop] for data in candidates)

    @invariant()
    def readers_see_what_they_saw(self) -> None:
        assert all(reader.view[:] == reader.seen for reader in self.model.readers)


StoreMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
