"""Delivery: the files appear whole, as the user's own, and nothing reaches back into the store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import small_model, stage_small, visible
from support.mounts import image, needs, needs_root, read_only, tmpfs
from support.stores import Opened, opened, read_files, write_files

from headrace.cache.deliver import DeliverReport, deliver, export
from headrace.cache.errors import NoSpace, NotStaged, StoreNotWritable, UnsafePath, UsageError

MODEL = {**small_model(), "tokenizer/vocab.txt": b"a\nb\n", "empty": b""}
SIZE = sum(map(len, MODEL.values()))
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def it(tmp_path: Path) -> Opened:
    snapshot = stage_small(str(write_files(tmp_path / "origin", MODEL)), tmp_path / "store").snapshot
    with opened(tmp_path / "store", snapshot) as it:
        return it


def test_every_file_appears_with_its_bytes_and_ordinary_modes(it: Opened, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "models"
    seen: list[int] = []
    previous = os.umask(0o077)
    try:
        report = deliver(it.snapshot, target, progress=seen.append)
    finally:
        os.umask(previous)
    assert read_files(target) == MODEL
    assert sum(seen) == SIZE
    assert (report.files, report.bytes, report.unchanged) == (len(MODEL), SIZE, 0)
    assert report.reflinked + report.copied == SIZE
    assert {(target / path).stat().st_mode & 0o777 for path in MODEL} == {0o644}
    assert (target / "tokenizer").stat().st_mode & 0o777 == 0o755


def test_what_is_written_there_does_not_reach_the_store(it: Opened, tmp_path: Path) -> None:
    deliver(it.snapshot, tmp_path / "out")
    for path in MODEL:
        assert not (tmp_path / "out" / path).samefile(it.link(path))
        (tmp_path / "out" / path).write_bytes(b"mine")
    assert visible(tmp_path / "store") == MODEL


def test_what_is_there_already_is_compared_and_left_alone(it: Opened, tmp_path: Path) -> None:
    target = tmp_path / "out"
    deliver(it.snapshot, target)
    (target / "mine.txt").write_text("mine")
    data = bytearray(MODEL[SHARD])
    data[1000] ^= 1
    status = (target / SHARD).stat()
    (target / SHARD).write_bytes(data)
    # Size and times as before: only the bytes tell.
    os.utime(target / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))
    inodes = {path: (target / path).stat().st_ino for path in MODEL}
    report = deliver(it.snapshot, target)
    assert report.unchanged == SIZE - len(MODEL[SHARD])
    assert read_files(target) == {**MODEL, "mine.txt": b"mine"}
    assert {p for p in MODEL if (target / p).stat().st_ino != inodes[p]} == {SHARD}


def test_links_in_the_destination_are_replaced_not_followed(it: Opened, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (target / "config.json").symlink_to(victim)
    os.link(it.link(SHARD), target / SHARD)
    deliver(it.snapshot, target)
    assert victim.read_text() == "untouched"
    assert not (target / "config.json").is_symlink()
    assert not (target / SHARD).samefile(it.link(SHARD))
    assert read_files(target) == MODEL


def test_a_folder_that_leads_out_of_the_destination_is_refused(it: Opened, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="leads out of"):
        deliver(it.snapshot, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_in_the_way_is_named(it: Opened, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file: give a directory"):
        deliver(it.snapshot, tmp_path / "file")
    (tmp_path / "a" / SHARD).mkdir(parents=True)
    with pytest.raises(UsageError, match="is a folder where the model has a file"):
        deliver(it.snapshot, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer").write_text("x")
    with pytest.raises(UsageError, match="is a file where the model has a folder"):
        deliver(it.snapshot, tmp_path / "b")
    for inside in ("store", "store/domains/x"):
        with pytest.raises(UsageError, match="lies inside the store"):
            deliver(it.snapshot, tmp_path / inside)


def test_only_complete_snapshots_are_delivered(it: Opened, tmp_path: Path) -> None:
    it.snapshot.files.rename(it.snapshot.path / "moved")
    with pytest.raises(NotStaged, match="not complete"):
        deliver(it.snapshot, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_wants_a_directory_of_its_own(it: Opened, tmp_path: Path) -> None:
    report = export(it.snapshot, tmp_path / "out")
    assert isinstance(report, DeliverReport)
    assert read_files(tmp_path / "out") == MODEL
    with pytest.raises(UsageError, match="is not empty"):
        export(it.snapshot, tmp_path / "out")


_KILLED = """
import os, signal, sys
from pathlib import Path
from headrace.cache import clone
from headrace.cache.deliver import deliver
from headrace.cache.snapshot import Snapshot

left = int(sys.argv[3])
original = clone.copy_range


def copy_range(*args):
    global left
    original(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


clone.reflink = lambda source, target: False
clone.copy_range = copy_range
deliver(Snapshot(Path(sys.argv[1])), sys.argv[2])
"""


def test_killed_midway_no_name_shows_half_a_file_and_the_next_run_cleans_up(
    it: Opened, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for nth in (1, 2, 3):
        target = tmp_path / f"out{nth}"
        command = [sys.executable, "-c", _KILLED, str(it.snapshot.path), str(target), str(nth)]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        shown = {p: d for p, d in read_files(target).items() if not Path(p).name.startswith(".headrace-")}
        assert all(MODEL[path] == data for path, data in shown.items())
        assert len(read_files(target)) > len(shown)
        deliver(it.snapshot, target)
        assert read_files(target) == MODEL


def test_a_run_that_is_still_at_work_keeps_its_temporary_file(it: Opened, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".headrace-deliver-other", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        deliver(it.snapshot, tmp_path / "out")
        assert Path(other.name).exists()
    deliver(it.snapshot, tmp_path / "out")
    assert read_files(tmp_path / "out") == MODEL


@needs_root
def test_too_little_space_is_said_before_the_first_byte(it: Opened, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", SIZE // 2) as small:
        with pytest.raises(NoSpace, match=r"\d+ bytes are missing") as caught:
            deliver(it.snapshot, small / "out")
        assert 0 < caught.value.missing <= SIZE
        assert read_files(small / "out") == {}


@needs_root
def test_another_file_system_gets_copies(it: Opened, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "other", 4 * SIZE) as other:
        assert deliver(it.snapshot, other).copied == SIZE
        assert read_files(other) == MODEL


@needs_root
def test_a_read_only_destination_is_said_so(it: Opened, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    with read_only(tmp_path / "ro") as folder, pytest.raises(StoreNotWritable, match="Read-only"):
        deliver(it.snapshot, folder / "out")


@needs_root
@needs("mkfs.xfs")
def test_on_xfs_blocks_are_shared_and_stay_apart_when_written(tmp_path: Path) -> None:
    with image("xfs", tmp_path / "disk", 320 << 20) as disk:
        files = {"weights.bin": os.urandom(8 << 20), "config.json": b"{}"}
        snapshot = stage_small(str(write_files(tmp_path / "origin", files)), disk / "store").snapshot
        with opened(disk / "store", snapshot) as it:
            report = deliver(it.snapshot, disk / "out")
            assert (report.reflinked, report.copied) == (sum(map(len, files.values())), 0)
            assert read_files(disk / "out") == files
            with open(disk / "out" / "weights.bin", "r+b") as file:
                file.write(bytes(1000))
        assert visible(disk / "store") == files
