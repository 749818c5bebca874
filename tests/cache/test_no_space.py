"""A full disk: said with how much is missing, nothing lost, and the next run goes on."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.models import CHUNK, PATIENT, below, published, small_model, stage_small, visible
from support.mounts import image, needs, needs_root, tmpfs
from support.stores import flip, opened

from headrace.cache.errors import NoSpace
from headrace.cache.prepare import StageRequest
from headrace.cache.repair import repair
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StagingJob
from headrace.cache.store import Store
from headrace.cache.verify import verify

MODEL = small_model()
OTHER = small_model(seed=1)
SIZE = sum(map(len, MODEL.values()))
SHARD = "model-00001-of-00002.safetensors"


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def fill(disk: Path, leave: int) -> Path:
    """Take all but `leave` bytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        size, step = 0, free(disk) - leave
        while step >= 4096 and free(disk) - leave >= 4096:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
            step = min(step, free(disk) - leave)
        os.fsync(file.fileno())
    # What the ballast's own bookkeeping left.
    assert free(disk) <= leave + (1 << 16)
    return ballast


@needs_root
def test_too_little_is_said_before_the_first_byte_is_fetched(tmp_path: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server, tmpfs(tmp_path / "disk", 2 * SIZE) as disk:
        Store.open(disk / "store").close()
        ballast = fill(disk, SIZE // 2)
        with pytest.raises(NoSpace, match=r"\d+ bytes are missing") as caught:
            stage_small(f"{server.url}/model", disk / "store")
        # To within the few blocks that the snapshot's own small files take.
        assert 0 <= caught.value.missing - (SIZE - SIZE // 2) <= 1 << 16
        assert str(caught.value.missing) in str(caught.value)
        # What is there has its size, but takes no room.
        assert free(disk) > SIZE // 2 - (1 << 17)
        header_bytes = server.bytes_sent("model/*")
        assert header_bytes < SIZE // 10
        ballast.unlink()
        stage_small(f"{server.url}/model", disk / "store")
        assert visible(disk / "store") == MODEL


@needs_root
def test_what_the_check_could_not_foresee_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """The bytes fit, the maps and digests beside them do not."""
    files = {**below("one", OTHER), **below("two", MODEL)}
    with FaultyServer(files) as server, tmpfs(tmp_path / "disk", 3 * SIZE) as disk:
        first = stage_small(f"{server.url}/one", disk / "store").snapshot
        # One of the objects is there already: the two configurations are of equal bytes, not of equal pins.
        ballast = fill(disk, SIZE + 24 * 1024)
        with pytest.raises(NoSpace, match=r"[1-9]\d* bytes are missing") as caught:
            stage_small(f"{server.url}/two", disk / "store")
        assert caught.value.missing > 0
        assert visible(disk / "store") == OTHER
        with opened(disk / "store", first) as it:
            assert verify(it.store, it.domain, it.snapshot).ok
            assert list((disk / "store" / "tmp").iterdir()) == []
        ballast.unlink()
        stage_small(f"{server.url}/two", disk / "store")
        with Store.open(disk / "store") as store:
            snapshots = list(store.domain().snapshots())
            assert all(verify(store, store.domain(), s).ok and s.complete for s in snapshots)
            assert len(snapshots) == 2


@needs_root
@needs("mkfs.ext4")
def test_a_disk_that_fills_up_midway_loses_nothing_that_was_fetched(tmp_path: Path) -> None:
    with (
        FaultyServer(below("model", published(MODEL)), rate=2e6) as server,
        image("ext4", tmp_path / "disk", 64 << 20) as disk,
    ):
        reference = f"{server.url}/model"
        limits = StagerLimits(span=CHUNK, connections=4, reserve=0)
        request = StageRequest(
            reference, str(disk / "store"), "default", workers=1, options=PATIENT, limits=limits
        )
        job = StagingJob(request).start()
        while job.progress.chunks < 3:
            job.check()
            time.sleep(0.001)
        ballast = fill(disk, 0)
        # Room for the bytes was taken at the start; room for the links was not.
        with pytest.raises(NoSpace, match=r"[1-9]\d* bytes are missing"):
            job.wait()
        assert visible(disk / "store") == {}
        ballast.unlink()
        server.clear()
        stage_small(reference, disk / "store")
        assert sum(server.bytes_sent(f"model/{path}") for path in MODEL) == 0
        assert visible(disk / "store") == MODEL


@needs_root
def test_a_repair_without_room_keeps_the_old_file(tmp_path: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server, tmpfs(tmp_path / "disk", 3 * SIZE) as disk:
        snapshot = stage_small(f"{server.url}/model", disk / "store").snapshot
        with opened(disk / "store", snapshot) as it:
            flip(it.data_of(SHARD), 10)
            damaged = it.data_of(SHARD).read_bytes()
            ballast = fill(disk, 1 << 20)
            with pytest.raises(NoSpace, match=r"[1-9]\d* bytes are missing") as caught:
                repair(it.store, it.domain, it.snapshot, options=PATIENT)
            assert 0 < caught.value.missing <= len(MODEL[SHARD])
            assert it.data_of(SHARD).read_bytes() == damaged
            assert not it.object_of(SHARD).partial.exists()
            ballast.unlink()
            repair(it.store, it.domain, it.snapshot, options=PATIENT)
            assert verify(it.store, it.domain, it.snapshot).ok


@needs_root
def test_a_full_disk_for_a_new_store_is_one_sentence(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 1 << 16) as disk:
        fill(disk, 0)
        with pytest.raises(NoSpace, match="no space left") as caught:
            Store.open(disk / "store")
        assert "\n" not in str(caught.value)
        (disk / "ballast").unlink()
        Store.open(disk / "store").close()
