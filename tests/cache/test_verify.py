"""verify names every chunk, file and link that is not what it has to be, and nothing else."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from support.models import CHUNK, grid_of, published, small_model, stage_small
from support.mounts import image, needs, needs_root
from support.stores import Opened, flip, opened, write_files

from headrace.cache.chunkmap import ChunkMap
from headrace.cache.errors import Interrupted, NotStaged
from headrace.cache.learned import LearnedDigests
from headrace.cache.manifest import Manifest
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StagingJob
from headrace.cache.verify import VerifyReport, verify

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))
SHARD = "model-00001-of-00002.safetensors"
GRID = grid_of(SHARD, MODEL[SHARD])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def staged(tmp_path: Path, root: Path, *, publish: bool = False) -> str:
    files = published(MODEL) if publish else MODEL
    return stage_small(str(write_files(tmp_path / "origin", files)), root).snapshot


def check(root: Path, snapshot: str) -> VerifyReport:
    with opened(root, snapshot) as it:
        return verify(it.store, it.domain, it.snapshot)


def forget_digests(it: Opened, path: str) -> None:
    """As after a power loss that tore every slot."""
    digests = it.object_of(path).digests
    size = digests.stat().st_size
    with open(digests, "r+b") as file:
        file.seek(64)
        file.write(bytes(size - 64))


@pytest.mark.parametrize("publish", [False, True])
def test_an_intact_snapshot_is_read_whole_and_found_right(tmp_path: Path, root: Path, publish: bool) -> None:
    snapshot = staged(tmp_path, root, publish=publish)
    read: list[int] = []
    with opened(root, snapshot) as it:
        report = verify(it.store, it.domain, it.snapshot, progress=read.append)
    assert report == VerifyReport(snapshot, len(MODEL), SIZE, True, (), (), ())
    assert report.ok
    assert sum(read) == SIZE


@pytest.mark.parametrize("publish", [False, True])
def test_every_bad_chunk_is_named_with_its_bytes(tmp_path: Path, root: Path, publish: bool) -> None:
    snapshot = staged(tmp_path, root, publish=publish)
    wrong = [0, 3, len(GRID) - 1]
    with opened(root, snapshot) as it:
        for index in wrong:
            flip(it.data_of(SHARD), GRID.offsets[index + 1] - 1)
        flip(it.data_of("config.json"), 0)
        report = verify(it.store, it.domain, it.snapshot)
    found = [(b.path, b.index, b.start, b.stop) for b in report.bad]
    expected = [(SHARD, i, *GRID.span(i, i + 1)) for i in wrong]
    assert found == [("config.json", 0, 0, len(MODEL["config.json"])), *expected]
    assert not report.ok


def test_a_right_object_is_noted_as_verified_and_a_wrong_one_is_not(tmp_path: Path, root: Path) -> None:
    snapshot = staged(tmp_path, root)
    with opened(root, snapshot) as it:
        for path in MODEL:
            with ChunkMap.open(it.object_of(path).map, writable=False) as chunk_map:
                chunk_map_file = it.object_of(path).map
            # As if it was last verified on another boot.
            with open(chunk_map_file, "r+b") as file:
                file.seek(60)
                file.write(bytes(36))
        flip(it.data_of(SHARD), 5)
        verify(it.store, it.domain, it.snapshot)
        for path in MODEL:
            with ChunkMap.open(it.object_of(path).map, writable=False) as chunk_map:
                assert chunk_map.verified_this_boot == (path != SHARD)


def hub_cache(folder: Path) -> Path:
    """A model's folder in a Hugging Face cache, whose weights are blobs named by their sha256."""
    model = folder / "models--org--name"
    links = model / "snapshots" / ("a" * 40)
    links.mkdir(parents=True)
    (model / "blobs").mkdir()
    for path, data in MODEL.items():
        name = hashlib.sha256(data).hexdigest()
        (model / "blobs" / name).write_bytes(data)
        (links / path).symlink_to(f"../../blobs/{name}")
    return links


def test_without_chunk_digests_the_whole_file_decides(tmp_path: Path, root: Path) -> None:
    snapshot = stage_small(str(hub_cache(tmp_path)), root).snapshot
    with opened(root, snapshot) as it:
        forget_digests(it, SHARD)
        assert verify(it.store, it.domain, it.snapshot).ok
        flip(it.data_of(SHARD), 70_000)
        report = verify(it.store, it.domain, it.snapshot)
    assert [(d.path, d.kind) for d in report.damaged] == [(SHARD, "digest")]
    assert report.bad == ()


def test_bytes_that_nothing_vouches_for_are_named_as_unknown(tmp_path: Path, root: Path) -> None:
    snapshot = staged(tmp_path, root)
    with opened(root, snapshot) as it:
        forget_digests(it, SHARD)
        report = verify(it.store, it.domain, it.snapshot)
    assert report.ok
    assert report.unknown == (SHARD,)


def test_a_truncated_object_and_one_with_more_bytes_are_named(tmp_path: Path, root: Path) -> None:
    snapshot = staged(tmp_path, root)
    with opened(root, snapshot) as it:
        os.truncate(it.data_of(SHARD), GRID.offsets[4] + 10)
        os.truncate(it.data_of("config.json"), 1000)
        report = verify(it.store, it.domain, it.snapshot)
    assert [b.index for b in report.bad] == list(range(4, len(GRID)))
    assert "ends at byte" in report.bad[0].why
    assert [(d.path, d.kind) for d in report.damaged] == [("config.json", "size")]


def test_missing_and_damaged_parts_are_named(tmp_path: Path, root: Path) -> None:
    snapshot = staged(tmp_path, root)
    other = "model-00002-of-00002.safetensors"
    with opened(root, snapshot) as it:
        it.object_of("config.json").map.write_bytes(b"not a map")
        it.data_of(SHARD).unlink()
        it.link(other).unlink()
        report = verify(it.store, it.domain, it.snapshot)
    assert {(d.path, d.kind) for d in report.damaged} == {
        ("config.json", "object"),
        (SHARD, "object"),
        (other, "link"),
    }


def test_a_link_to_other_bytes_is_named_and_a_copy_is_not(tmp_path: Path, root: Path) -> None:
    snapshot = staged(tmp_path, root)
    with opened(root, snapshot) as it:
        for path, data in ((SHARD, MODEL[SHARD]), ("config.json", b"x" * len(MODEL["config.json"]))):
            it.link(path).unlink()
            it.link(path).write_bytes(data)
        report = verify(it.store, it.domain, it.snapshot)
    assert [(d.path, d.kind) for d in report.damaged] == [("config.json", "link")]


def partly_staged(tmp_path: Path, root: Path, chunks: int) -> str:
    """Stage until some chunks are there, then stop as Ctrl-C does."""
    origin = write_files(tmp_path / "origin", MODEL)

    class Stopping(Progress):
        def add(self, source: str, size: int, chunks: int = 1) -> None:
            super().add(source, size, chunks)
            if self.chunks >= wanted:
                raise Interrupted("enough")

    wanted = chunks
    limits = StagerLimits(span=CHUNK, connections=1, reserve=0)
    request = StageRequest(str(origin), str(root), "default", workers=1, chunk=CHUNK, limits=limits)
    job = StagingJob(request, Stopping())
    with pytest.raises(Interrupted):
        job.start().wait()
    assert job.opened is not None
    return job.opened[1].id


def test_of_an_incomplete_snapshot_what_is_there_is_checked(tmp_path: Path, root: Path) -> None:
    snapshot = partly_staged(tmp_path, root, 6)
    with opened(root, snapshot) as it:
        report = verify(it.store, it.domain, it.snapshot)
        assert report.ok
        assert not report.complete
        assert 0 < report.bytes < SIZE
        flip(it.object_of(SHARD).partial, 1)
        report = verify(it.store, it.domain, it.snapshot)
        assert [(b.path, b.index) for b in report.bad] == [(SHARD, 0)]


def test_a_snapshot_that_is_not_there_is_said_so(tmp_path: Path, root: Path) -> None:
    staged(tmp_path, root)
    with pytest.raises(NotStaged, match="stage it"):
        check(root, "0" * 64)


def test_several_chunk_parts_of_a_large_file_are_read_by_several_threads(tmp_path: Path, root: Path) -> None:
    data = os.urandom(75 << 20)
    origin = write_files(tmp_path / "origin", {"blob.bin": data})
    snapshot = stage_small(str(origin), root, chunk=5 << 20).snapshot
    with opened(root, snapshot) as it:
        assert verify(it.store, it.domain, it.snapshot, threads=3).bytes == len(data)
        flip(it.data_of("blob.bin"), 74 << 20)
        report = verify(it.store, it.domain, it.snapshot, threads=3)
    assert [b.index for b in report.bad] == [14]


@needs_root
@needs("mkfs.ext4")
def test_what_only_the_disk_has_lost_is_found_behind_the_page_cache(tmp_path: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    with image("ext4", tmp_path / "disk", 64 << 20) as disk:
        snapshot = stage_small(str(origin), disk / "store").snapshot
        with opened(disk / "store", snapshot) as it:
            offset = GRID.offsets[3] + 100
            block = MODEL[SHARD][offset : offset + 64]
            backing = (tmp_path / "disk.img").read_bytes()
            assert backing.count(block) == 1
            with open(tmp_path / "disk.img", "r+b") as file:
                file.seek(backing.index(block))
                file.write(bytes(64))
            # The pages in memory are still right.
            assert it.link(SHARD).read_bytes() == MODEL[SHARD]
            report = verify(it.store, it.domain, it.snapshot)
    assert [(b.path, b.index) for b in report.bad] == [(SHARD, 3)]


def test_learned_digests_of_another_algorithm_are_kept_apart(tmp_path: Path, root: Path) -> None:
    origin = write_files(tmp_path / "origin", MODEL)
    snapshot = stage_small(str(origin), root, algorithm="blake3").snapshot
    with opened(root, snapshot) as it:
        content: Manifest = it.snapshot.manifest()
        learned = LearnedDigests(it.object_of(SHARD).digests, writable=False)
        assert (content.algorithm, learned.algorithm) == ("blake3", "blake3")
        learned.close()
        assert verify(it.store, it.domain, it.snapshot).ok
        flip(it.data_of(SHARD), 9)
        assert [b.index for b in verify(it.store, it.domain, it.snapshot).bad] == [0]
