"""Repair fetches just the bad chunks into a new inode, everywhere it is shown, whenever it is killed."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.models import (
    CHUNK,
    PATIENT,
    below,
    grid_of,
    manifest_of,
    published,
    small_model,
    stage_small,
    visible,
)
from support.mounts import image, needs, needs_root
from support.stores import Opened, flip, opened, write_files

from headrace.cache import object as objects
from headrace.cache.errors import Held, NotFound, OriginChanged, OriginError
from headrace.cache.evict import remove
from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.object import ObjectWriter
from headrace.cache.repair import RepairReport, repair
from headrace.cache.verify import verify

MODEL = small_model()
SHARD = "model-00001-of-00002.safetensors"
GRID = grid_of(SHARD, MODEL[SHARD])
BAD = (1, 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fix(it: Opened) -> RepairReport:
    report = repair(it.store, it.domain, it.snapshot, options=PATIENT)
    assert verify(it.store, it.domain, it.snapshot).ok
    return report


def spoil(it: Opened, path: str = SHARD, indexes: tuple[int, ...] = BAD) -> None:
    grid = grid_of(path, MODEL[path])
    for index in indexes:
        flip(it.data_of(path), grid.offsets[index] + 3)


@pytest.mark.parametrize("publish", [False, True])
def test_only_the_bad_chunks_are_fetched(root: Path, publish: bool) -> None:
    with FaultyServer(below("model", published(MODEL) if publish else MODEL)) as server:
        snapshot = stage_small(f"{server.url}/model", root).snapshot
        with opened(root, snapshot) as it:
            spoil(it)
            server.clear()
            report = fix(it)
        sizes = {i: GRID.lengths[i] for i in BAD}
        assert server.bytes_sent(f"model/{SHARD}") == sum(sizes.values())
        assert sum(server.bytes_sent(f"model/{path}") for path in MODEL if path != SHARD) == 0
        assert {(c.path, c.index, c.bytes, c.source) for c in report.chunks} == {
            (SHARD, i, size, "origin") for i, size in sizes.items()
        }
        assert report.sources == {"origin": sum(sizes.values()), "peer": 0, "local": 0}
        assert visible(root) == MODEL


def test_nothing_is_written_into_the_old_inode_and_its_holders_are_named(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(write_files(tmp_path / "origin", MODEL)), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        damaged = it.link(SHARD).read_bytes()
        reader = (
            "import mmap, sys\n"
            "f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); f.close()\n"
            "print('mapped', flush=True); sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", reader, str(it.link(SHARD))]
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
            open(it.link(SHARD), "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as before,
        ):
            assert child.stdout is not None
            assert child.stdin is not None
            child.stdout.readline()
            report = fix(it)
            assert before[:] == damaged
            assert {h.pid: h.how for h in report.holders.found} == {
                child.pid: "mapped",
                os.getpid(): "mapped",
            }
            child.stdin.close()
        assert report.relinked == ((snapshot, SHARD),)
        assert it.link(SHARD).samefile(it.data_of(SHARD))
        assert it.data_of(SHARD).stat().st_mode & 0o777 == 0o444
        assert visible(root) == MODEL


def test_equal_chunks_on_this_disk_save_the_origin(root: Path) -> None:
    """Two revisions that share all but a few chunks."""
    second = dict(MODEL)
    second[SHARD] = MODEL[SHARD][:-10] + bytes(10)
    files = {**below("one", published(MODEL)), **below("two", published(second))}
    with FaultyServer(files) as server:
        snapshot = stage_small(f"{server.url}/one", root).snapshot
        stage_small(f"{server.url}/two", root)
        server.clear()
        with opened(root, snapshot) as it:
            spoil(it)
            report = fix(it)
        assert {c.source for c in report.chunks} == {"local"}
        assert sum(server.bytes_sent(f"*/{path}") for path in MODEL) == 0


def test_other_snapshots_with_the_same_object_show_the_repaired_bytes(tmp_path: Path, root: Path) -> None:
    more = {**MODEL, "extra.json": b"{}"}
    first = stage_small(str(write_files(tmp_path / "one", published(MODEL))), root).snapshot
    second = stage_small(str(write_files(tmp_path / "two", published(more))), root).snapshot
    with opened(root, first) as it, opened(root, second) as other:
        assert it.data_of(SHARD) == other.data_of(SHARD)
        spoil(it)
        report = fix(it)
        assert set(report.relinked) == {(first, SHARD), (second, SHARD)}
        assert other.link(SHARD).read_bytes() == MODEL[SHARD]
        assert verify(other.store, other.domain, other.snapshot).ok


def test_other_objects_on_the_same_bad_inode_are_repaired_too(tmp_path: Path, root: Path) -> None:
    """The same bytes under two addresses, without digests: two objects, one inode."""
    first = stage_small(str(write_files(tmp_path / "one", MODEL)), root).snapshot
    second = stage_small(str(write_files(tmp_path / "two", MODEL)), root).snapshot
    with opened(root, first) as it, opened(root, second) as other:
        assert it.data_of(SHARD) != other.data_of(SHARD)
        assert it.data_of(SHARD).samefile(other.data_of(SHARD))
        spoil(it)
        fix(it)
        assert it.data_of(SHARD).samefile(other.data_of(SHARD))
        assert other.link(SHARD).read_bytes() == MODEL[SHARD]
        assert verify(other.store, other.domain, other.snapshot).ok


def test_without_the_origin_nothing_is_changed(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        damaged, inode = it.data_of(SHARD).read_bytes(), it.data_of(SHARD).stat().st_ino
        shutil.rmtree(origin)
        with pytest.raises(OriginError, match=f"chunk 1 of '{SHARD}' cannot be had again"):
            repair(it.store, it.domain, it.snapshot)
        assert (it.data_of(SHARD).read_bytes(), it.data_of(SHARD).stat().st_ino) == (damaged, inode)
        assert not it.object_of(SHARD).partial.exists()


def test_other_bytes_at_the_origin_are_refused(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        damaged = it.data_of(SHARD).read_bytes()
        (origin / SHARD).write_bytes(small_model(seed=7)[SHARD])
        with pytest.raises(OriginChanged, match="cannot be had again"):
            repair(it.store, it.domain, it.snapshot)
        assert it.data_of(SHARD).read_bytes() == damaged


def test_the_same_bytes_uploaded_again_are_as_good(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        shutil.rmtree(origin)
        write_files(origin, MODEL)
        fix(it)
    assert visible(root) == MODEL


def test_a_truncated_or_longer_object_is_made_whole(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(write_files(tmp_path / "origin", MODEL)), root).snapshot
    with opened(root, snapshot) as it:
        os.truncate(it.data_of(SHARD), GRID.offsets[-3] + 1)
        os.truncate(it.data_of("config.json"), 100)
        report = fix(it)
    assert {c.index for c in report.chunks} == {len(GRID) - 2, len(GRID) - 1}
    assert visible(root) == MODEL


def test_a_missing_or_damaged_object_is_rebuilt_from_its_own_bytes(root: Path) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        snapshot = stage_small(f"{server.url}/model", root).snapshot
        server.clear()
        with opened(root, snapshot) as it:
            inode = it.link(SHARD).stat().st_ino
            shutil.rmtree(it.object_of(SHARD).path)
            it.object_of("config.json").map.write_bytes(b"not a map")
            report = fix(it)
            assert report.rebuilt == ("config.json", SHARD)
            assert it.link(SHARD).stat().st_ino == it.data_of(SHARD).stat().st_ino == inode
        assert server.requests() == []
        assert visible(root) == MODEL


def test_an_object_that_is_lost_for_good_is_fetched_again(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        snapshot = stage_small(f"{server.url}/model", root).snapshot
        server.clear()
        with opened(root, snapshot) as it:
            shutil.rmtree(it.object_of(SHARD).path)
            it.link(SHARD).unlink()
            fix(it)
        assert sum(server.bytes_sent(f"model/{path}") for path in MODEL) == len(MODEL[SHARD])
        assert visible(root) == MODEL


def test_links_are_replaced_though_every_object_is_right(tmp_path: Path, root: Path) -> None:
    files = {**MODEL, "sub/folder/tokens.txt": b"tokens"}
    snapshot = stage_small(str(write_files(tmp_path / "origin", files)), root).snapshot
    with opened(root, snapshot) as it:
        it.link(SHARD).unlink()
        it.link(SHARD).write_bytes(bytes(len(MODEL[SHARD])))
        shutil.rmtree(it.snapshot.files / "sub")
        report = fix(it)
    assert set(report.relinked) == {(snapshot, SHARD), (snapshot, "sub/folder/tokens.txt")}
    assert report.chunks == ()
    assert visible(root) == files


def test_while_a_stager_has_the_object_open_repair_says_so(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(write_files(tmp_path / "origin", MODEL)), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        folder = it.object_of(SHARD)
        writer = ObjectWriter(folder, folder.spec())
        try:
            with pytest.raises(Held, match="repeat it later"):
                os.close(objects.lock_exclusively(folder, "repairing it", timeout=0.05))
        finally:
            writer.close()
        fix(it)


def test_a_snapshot_that_nothing_knows_the_origin_of_is_said_so(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(write_files(tmp_path / "origin", published(MODEL))), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        it.snapshot.replace_manifest(manifest_of(MODEL))
        shutil.rmtree(it.snapshot.path / "names")
        with pytest.raises(NotFound, match="nothing says where"):
            repair(it.store, it.domain, it.snapshot)


def test_what_no_digest_vouches_for_is_fetched_from_the_pinned_version(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        digests = it.object_of(SHARD).digests
        os.truncate(it.data_of(SHARD), GRID.offsets[2])
        with open(digests, "r+b") as file:
            file.seek(64)
            file.write(bytes(digests.stat().st_size - 64))
        fix(it)
        assert verify(it.store, it.domain, it.snapshot).unknown == ()
    assert visible(root) == MODEL


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_what_came_out_of_an_archive_is_taken_from_it_again(tmp_path: Path, root: Path, kind: str) -> None:
    folder = write_files(tmp_path / "files", MODEL)
    archive = tmp_path / ("model.tar" if kind == "w" else "model.tar.gz")
    with tarfile.open(archive, kind) as writer:  # type: ignore[call-overload]
        for path in MODEL:
            writer.add(folder / path, path)
    reference = str(archive)
    snapshot = stage_small(reference, root).snapshot
    archive.unlink()
    with opened(root, snapshot) as it:
        spoil(it)
        assert fix(it).sources["origin"] == 0
        assert {path: it.link(path).read_bytes() for path in MODEL} == MODEL


def test_what_came_out_of_an_archive_and_is_lost_is_staged_again(tmp_path: Path, root: Path) -> None:
    folder = write_files(tmp_path / "files", MODEL)
    archive = tmp_path / "model.tar"
    with tarfile.open(archive, "w") as writer:
        for path in MODEL:
            writer.add(folder / path, path)
    snapshot = stage_small(str(archive), root).snapshot
    with opened(root, snapshot) as it:
        shutil.rmtree(it.object_of(SHARD).path)
        it.link(SHARD).unlink()
        with pytest.raises(NotFound, match="rm` it, then stage it again"):
            repair(it.store, it.domain, it.snapshot)
        remove(it.store, it.domain, it.snapshot)
    stage_small(str(archive), root)
    with opened(root, snapshot) as it:
        assert verify(it.store, it.domain, it.snapshot).ok


# -- killed

_KILLED = """
import os, signal, sys
from pathlib import Path
from headrace.cache.repair import repair
from headrace.cache.store import Store

nth, when, calls = int(sys.argv[3]), sys.argv[4], 0
original = os.rename


def rename(*names, **more):
    global calls
    calls += 1
    if calls == nth and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*names, **more)
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)


with Store.open(sys.argv[1]) as store:
    domain = store.domain()
    os.rename = rename
    repair(store, domain, domain.snapshot(sys.argv[2]))
print(calls)
"""


def test_killed_before_or_after_any_rename_every_path_shows_a_whole_file(tmp_path: Path, root: Path) -> None:
    """One rename for the object, one for the twin of another address, one for each of two links."""
    first = stage_small(str(write_files(tmp_path / "one", MODEL)), root).snapshot
    second = stage_small(str(write_files(tmp_path / "two", MODEL)), root).snapshot
    saved = tmp_path / "saved"
    with opened(root, first) as it:
        spoil(it)
        damaged = it.data_of(SHARD).read_bytes()
    # Hard links and all.
    subprocess.run(["cp", "-a", str(root), str(saved)], check=True)
    nth = 0
    while True:
        nth += 1
        codes = []
        for when in ("before", "after"):
            shutil.rmtree(root)
            subprocess.run(["cp", "-a", str(saved), str(root)], check=True)
            command = [sys.executable, "-c", _KILLED, str(root), first, str(nth), when]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            codes.append(
                subprocess.run(command, env=environment, capture_output=True, check=False).returncode
            )
            for snapshot in (first, second):
                with opened(root, snapshot) as it:
                    for path, data in MODEL.items():
                        shown = it.link(path).read_bytes()
                        assert shown == data or (path == SHARD and shown == damaged)
                    repair(it.store, it.domain, it.snapshot)
                    assert verify(it.store, it.domain, it.snapshot).ok
            assert visible(root) == MODEL
        if codes == [0, 0]:
            break
        assert codes == [-signal.SIGKILL] * 2
    assert nth - 1 == 4


def test_killed_while_filling_leaves_the_published_file_as_it_was(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(write_files(tmp_path / "origin", MODEL)), root).snapshot
    with opened(root, snapshot) as it:
        spoil(it)
        before = it.data_of(SHARD).stat()
        it.object_of(SHARD).partial.write_bytes(b"half of a repair")
        fix(it)
        assert not it.object_of(SHARD).partial.exists()
        assert it.data_of(SHARD).stat().st_ino != before.st_ino
    assert visible(root) == MODEL


def test_a_bad_chunk_of_an_unfinished_object_is_fetched_by_the_next_stage(root: Path) -> None:
    big = MODEL[SHARD]
    with FaultyServer(below("model", published({SHARD: big}))) as server:
        reference = f"{server.url}/model"
        snapshot = stage_small(reference, root).snapshot
        with opened(root, snapshot) as it:
            folder = it.object_of(SHARD)
            # As it was a moment before its completion.
            shutil.rmtree(it.snapshot.files)
            folder.data.rename(folder.partial)
            folder.partial.chmod(0o600)
            flip(folder.partial, GRID.offsets[2])
            report = repair(it.store, it.domain, it.snapshot)
            assert report.withdrawn == ((SHARD, 2),)
        server.clear()
        stage_small(reference, root)
        assert server.bytes_sent(f"model/{SHARD}") == GRID.lengths[2]
        assert visible(root) == {SHARD: big}
        assert PUBLISHED_NAME not in visible(root)


@needs_root
@needs("mkfs.xfs")
def test_where_blocks_can_be_shared_a_repair_takes_only_the_bad_chunks_room(tmp_path: Path) -> None:
    data = os.urandom(48 << 20)
    origin = write_files(tmp_path / "origin", {"weights.bin": data})
    with image("xfs", tmp_path / "disk", 320 << 20) as disk:
        snapshot = stage_small(str(origin), disk / "store", chunk=1 << 20).snapshot
        with opened(disk / "store", snapshot) as it:
            flip(it.data_of("weights.bin"), 5 << 20)
            with open(it.link("weights.bin"), "rb"):
                # The old inode stays as long as it is open: a copy would take its size once more.
                os.sync()
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                fix(it)
                os.sync()
                taken = free - os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        assert taken < 16 << 20
        assert visible(disk / "store") == {"weights.bin": data}
    assert CHUNK < 1 << 20
