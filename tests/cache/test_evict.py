"""Eviction frees what nobody holds or shares, least recently used first, and survives being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.models import CHUNK, published, small_model, stage_small, visible
from support.stores import Opened, disk_usage, opened, write_files

from headrace.cache import holds
from headrace.cache.errors import HeadraceError, Held, NotStaged, UsageError
from headrace.cache.evict import collect, pin, remove, unpin, usage
from headrace.cache.holds import HoldRecord
from headrace.cache.object import ObjectWriter
from headrace.cache.store import Store
from headrace.cache.verify import verify

MODEL = small_model()
OTHER = small_model(seed=1)
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stage(tmp_path: Path, root: Path, name: str, files: dict[str, bytes]) -> str:
    return stage_small(str(write_files(tmp_path / name, files)), root).snapshot


def used_at(it: Opened, seconds: float) -> None:
    os.utime(it.snapshot.path / "used", (seconds, seconds))


def object_ids(root: Path) -> set[str]:
    return {path.name for path in root.glob("domains/*/objects/*")}


def test_what_is_removed_is_gone_and_its_bytes_are_free(tmp_path: Path, root: Path) -> None:
    first = stage(tmp_path, root, "one", MODEL)
    second = stage(tmp_path, root, "two", OTHER)
    with opened(root, first) as it:
        before = disk_usage(root)
        assert usage(it.store) == before
        removed = remove(it.store, it.domain, it.snapshot)
        assert removed.bytes == before - disk_usage(root)
        # Both have the same configuration file, which the other snapshot still needs.
        sizes = [len(data) for path, data in MODEL.items() if path != "config.json"]
        assert removed.bytes >= sum(sizes)
        assert removed.names == (f"file://{tmp_path / 'one'}",)
        assert not it.snapshot.path.exists()
        with pytest.raises(NotStaged):
            remove(it.store, it.domain, it.snapshot)
        assert list((root / "trash").iterdir()) == []
    assert visible(root) == OTHER
    with opened(root, second) as it:
        assert verify(it.store, it.domain, it.snapshot).ok


def test_objects_that_another_snapshot_shares_stay(tmp_path: Path, root: Path) -> None:
    more = {**MODEL, "extra.json": b"{}"}
    first = stage(tmp_path, root, "one", published(MODEL))
    second = stage(tmp_path, root, "two", published(more))
    with opened(root, first) as it:
        removed = remove(it.store, it.domain, it.snapshot)
        assert removed.objects == 0
        assert removed.bytes < CHUNK
    with opened(root, second) as it:
        assert visible(root) == more
        assert verify(it.store, it.domain, it.snapshot).ok
        assert remove(it.store, it.domain, it.snapshot).objects == len(more)
    assert object_ids(root) == set()


def test_a_reader_keeps_a_snapshot_until_it_closes_or_dies(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        reader = (
            "import sys\nfrom pathlib import Path\nfrom headrace.cache.snapshot import Snapshot\n"
            "fd = Snapshot(Path(sys.argv[1])).hold()\nprint(fd, flush=True)\nsys.stdin.read()\n"
        )
        command = [sys.executable, "-c", reader, str(it.snapshot.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            with pytest.raises(Held, match="a reader has it open"):
                remove(it.store, it.domain, it.snapshot, force=True)
            assert collect(it.store, max_bytes=0).kept[0].id == snapshot
            assert visible(root) == MODEL
            child.kill()
        remove(it.store, it.domain, it.snapshot)
    assert visible(root) == {}


def test_a_pin_keeps_a_snapshot_from_all_but_force(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        pin(it.snapshot, "production")
        with pytest.raises(Held, match=r"it is pinned \(production\); unpin it first"):
            remove(it.store, it.domain, it.snapshot)
        report = collect(it.store, max_bytes=0)
        assert "pinned" in report.kept[0].why
        assert report.excess == report.after > 0
        unpin(it.snapshot)
        unpin(it.snapshot)
        assert collect(it.store, max_bytes=0).removed[0].id == snapshot
        with pytest.raises(NotStaged):
            pin(it.snapshot)


def test_force_removes_what_is_pinned(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        pin(it.snapshot)
        remove(it.store, it.domain, it.snapshot, force=True)
    assert visible(root) == {}


def test_a_published_volume_keeps_a_snapshot(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        holds.add(it.store, HoldRecord("pvc-1", "default", snapshot, "pod web-0"))
        for force in (False, True):
            with pytest.raises(Held, match=r"the volume pvc-1 uses it \(pod web-0\)"):
                remove(it.store, it.domain, it.snapshot, force=force)
        assert collect(it.store, max_bytes=0).removed == ()
        holds.remove(it.store, "pvc-1")
        remove(it.store, it.domain, it.snapshot)


def test_the_least_recently_used_go_first_and_only_as_far_as_needed(tmp_path: Path, root: Path) -> None:
    ids = {name: stage(tmp_path, root, name, small_model(seed=i)) for i, name in enumerate("abc")}
    for age, name in ((300, "b"), (200, "c"), (100, "a")):
        with opened(root, ids[name]) as it:
            used_at(it, time.time() - age)
    with Store.open(root) as store:
        size = usage(store)
        report = collect(store, max_bytes=size - 1)
        assert [r.id for r in report.removed] == [ids["b"]]
        assert (report.before, report.after, report.excess) == (size, usage(store), 0)
        assert report.before - report.after == sum(r.bytes for r in report.removed)
        assert [r.id for r in collect(store, max_bytes=1).removed] == [ids["c"], ids["a"]]


def test_what_is_in_use_counts_as_just_used(tmp_path: Path, root: Path) -> None:
    held = stage(tmp_path, root, "one", MODEL)
    with opened(root, held) as it:
        used_at(it, 1000.0)
        hold = it.snapshot.hold()
        assert hold is not None
        collect(it.store, max_bytes=0)
        os.close(hold)
        assert it.snapshot.last_used > time.time() - 60


def test_without_a_limit_only_leftovers_go(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        orphan = it.domain.path / "objects" / ("0" * 64)
        subprocess.run(["cp", "-a", str(it.object_of(SHARD).path), str(orphan)], check=True)
        scratch = it.object_of(SHARD).partial
        scratch.write_bytes(b"a repair that was cut short")
        temporary = it.snapshot.path / ".tmp-1"
        temporary.write_bytes(b"")
        # Young leftovers may be somebody's work in progress.
        assert collect(it.store).removed == ()
        assert scratch.exists() and temporary.exists()
        report = collect(it.store, leftover_age=-1)
        assert [(r.kind, r.id) for r in report.removed] == [("leftover", orphan.name)]
        assert report.removed[0].bytes >= len(MODEL[SHARD])
        assert not scratch.exists()
        assert not temporary.exists()
        assert verify(it.store, it.domain, it.snapshot).ok
    assert visible(root) == MODEL


def test_a_staging_that_nobody_resumed_is_a_leftover(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        subprocess.run(["rm", "-r", str(it.snapshot.files)], check=True)
        assert collect(it.store).removed == ()
        used_at(it, time.time() - 2 * 86400)
        assert [(r.id, r.why) for r in collect(it.store).removed] == [(snapshot, "never completed")]
    assert object_ids(root) == set()


def test_an_object_that_a_stager_has_open_stays(tmp_path: Path, root: Path) -> None:
    snapshot = stage(tmp_path, root, "one", MODEL)
    with opened(root, snapshot) as it:
        folder = it.object_of(SHARD)
        writer = ObjectWriter(folder, folder.spec())
        try:
            remove(it.store, it.domain, it.snapshot)
            assert object_ids(root) == {folder.id}
        finally:
            writer.close()
        assert collect(it.store, leftover_age=-1).removed[0].id == folder.id


def test_a_negative_limit_is_refused(root: Path) -> None:
    with Store.open(root) as store, pytest.raises(UsageError, match="0 or more"):
        collect(store, max_bytes=-1)


def test_staging_and_evicting_the_same_snapshot_at_once_both_end_well(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    stop = threading.Event()
    errors: list[BaseException] = []
    removed = 0

    def evict() -> None:
        nonlocal removed
        with Store.open(root) as store:
            while not stop.is_set():
                for snapshot in store.domain().snapshots():
                    try:
                        remove(store, store.domain(), snapshot)
                        removed += 1
                    except (Held, NotStaged):
                        time.sleep(0.001)
                    except HeadraceError as error:
                        errors.append(error)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        rounds = 0
        while rounds < 8 or (removed == 0 and time.monotonic() < deadline):
            report = stage_small(str(origin), root)
            assert report.files == len(MODEL)
            rounds += 1
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert removed > 0
    stage_small(str(origin), root)
    assert visible(root) == MODEL


_KILLED = """
import os, signal, sys
from headrace.cache.evict import remove
from headrace.cache.store import Store

nth, calls = int(sys.argv[3]), 0
original = os.rename


def rename(*names, **more):
    global calls
    original(*names, **more)
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)


with Store.open(sys.argv[1]) as store:
    domain = store.domain()
    os.rename = rename
    remove(store, domain, domain.snapshot(sys.argv[2]))
"""


def test_killed_after_any_rename_the_rest_is_found_and_the_others_are_whole(
    tmp_path: Path, root: Path
) -> None:
    first = stage(tmp_path, root, "one", MODEL)
    second = stage(tmp_path, root, "two", OTHER)
    saved = tmp_path / "saved"
    subprocess.run(["cp", "-a", str(root), str(saved)], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The snapshot, then its objects.
    for nth in range(1, 1 + 1 + len(MODEL)):
        subprocess.run(["rm", "-rf", str(root)], check=True)
        subprocess.run(["cp", "-a", str(saved), str(root)], check=True)
        command = [sys.executable, "-c", _KILLED, str(root), first, str(nth)]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        with opened(root, second) as it:
            assert list((root / "trash").iterdir()) == []
            assert verify(it.store, it.domain, it.snapshot).ok
            collect(it.store, leftover_age=-1)
            named = {it.object_of(path).id for path in OTHER}
        assert object_ids(root) == named
        assert visible(root) == OTHER
