"""One run of the stager: each byte once, in order, by several workers, and what readers want first."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support.faulty_server import Fault, FaultyServer
from support.models import CHUNK, PATIENT, below, published, small_model, stage_small, visible

from headrace.cache.errors import AccessDenied, Interrupted, NoSpace, StagingStopped
from headrace.cache.object import ObjectFolder
from headrace.cache.prepare import StageRequest
from headrace.cache.reading import StoredSnapshot
from headrace.cache.snapshot import Selection
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StagingJob, open_for_loading
from headrace.cache.store import Store

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def sent(server: FaultyServer) -> int:
    return sum(server.bytes_sent(f"model/{path}") for path in MODEL)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_byte_is_fetched_once(root: Path, workers: int) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        report = stage_small(f"{server.url}/model", root, workers=workers)
        assert visible(root) == MODEL
        assert sent(server) == SIZE
        assert report.sources == {"origin": SIZE, "peer": 0, "local": 0}
        assert report.bytes == SIZE
        assert report.files == len(MODEL)


def test_what_workers_fetched_is_in_the_report(root: Path) -> None:
    """Also when they are still at work when there is nothing left to do."""
    limits = StagerLimits(span=CHUNK, connections=2, reserve=0)
    with FaultyServer(below("model", MODEL), rate=3e5) as server:
        request = StageRequest(
            f"{server.url}/model",
            str(root),
            "default",
            options=PATIENT,
            chunk=CHUNK,
            workers=3,
            limits=limits,
        )
        job = StagingJob(request).start()
        # What is present and not fetched here, a worker has fetched.
        while not job.progress.present and job.progress.done < SIZE:
            time.sleep(0.01)
        assert server.pace is not None
        server.pace.rate = 1e7
        report = job.wait()
        assert visible(root) == MODEL
        assert sent(server) == SIZE
        assert report.sources == {"origin": SIZE, "peer": 0, "local": 0}


def test_a_second_run_fetches_nothing(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        first = stage_small(f"{server.url}/model", root)
        server.clear()
        second = stage_small(f"{server.url}/model", root)
        assert second.snapshot == first.snapshot
        assert sent(server) == 0


def test_requests_join_adjacent_chunks_up_to_the_span(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        stage_small(
            f"{server.url}/model", root, limits=StagerLimits(span=16 * CHUNK, connections=2, reserve=0)
        )
        assert visible(root) == MODEL
        assert sent(server) == SIZE
        largest = max(r.sent for r in server.requests("model/*.safetensors"))
        assert 4 * CHUNK < largest <= 16 * CHUNK


def test_chunks_are_asked_for_in_file_order(root: Path) -> None:
    with FaultyServer(below("model", MODEL), connection_rate=2e6) as server:
        stage_small(f"{server.url}/model", root, limits=StagerLimits(span=CHUNK, connections=4, reserve=0))
        shards = [r for r in server.requests("model/*.safetensors") if r.start > 8]
        for connection in {r.connection for r in shards}:
            asked = [(r.path, r.start) for r in shards if r.connection == connection]
            assert asked == sorted(asked)


def test_what_a_reader_waits_for_comes_first(root: Path) -> None:
    with FaultyServer(below("model", MODEL), rate=4e6) as server:
        limits = StagerLimits(span=CHUNK, connections=2, reserve=0)
        request = StageRequest(
            f"{server.url}/model",
            str(root),
            "default",
            options=PATIENT,
            limits=limits,
            chunk=CHUNK,
            workers=1,
        )
        job = StagingJob(request).start()
        assert job.prepared.wait(10)
        job.check()
        assert job.opened is not None
        source = StoredSnapshot(*job.opened, check=job.check)
        last = source.open("model-00002-of-00002.safetensors")
        last.wait(last.size - 10, last.size, timeout=20)
        assert job.progress.done < SIZE
        job.wait()
        last.close()
        source.close()
        assert visible(root) == MODEL


def test_a_loader_reads_while_another_process_stages(root: Path) -> None:
    """Opened by reference, every byte can be read as soon as its wait returns."""
    with FaultyServer(below("model", published(MODEL)), rate=8e6) as server:
        source = open_for_loading(f"{server.url}/model", root=str(root))
        assert source.job is not None
        for path, data in MODEL.items():
            file = source.open(path)
            for start in range(0, len(data), CHUNK):
                stop = min(start + CHUNK, len(data))
                file.wait(start, stop, timeout=30)
                assert os.pread(file.fileno(), stop - start, start) == data[start:stop]
            file.close()
        source.job.wait()
        source.close()


def test_cancelling_stops_keeps_and_resumes(root: Path) -> None:
    with FaultyServer(below("model", MODEL), rate=3e6) as server:
        request = StageRequest(
            f"{server.url}/model", str(root), "default", options=PATIENT, chunk=CHUNK, workers=1,
            limits=StagerLimits(span=CHUNK, connections=2, reserve=0),
        )  # fmt: skip
        job = StagingJob(request).start()
        while job.progress.chunks < 5:
            time.sleep(0.01)
        job.cancel()
        with pytest.raises(Interrupted):
            job.wait()
        assert visible(root) == {}
        assert not [t for t in threading.enumerate() if t.name.startswith("headrace")]
        had = job.progress.fetched["origin"]
        server.pace = None
        report = stage_small(f"{server.url}/model", root)
        assert report.sources["origin"] == SIZE - had
        assert visible(root) == MODEL


def test_waiting_for_what_nobody_stages_ends_in_a_clear_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.cache.reading._ABANDONED", 0.3)
    with FaultyServer(below("model", MODEL), rate=3e6) as server:
        request = StageRequest(
            f"{server.url}/model", str(root), "default", options=PATIENT, chunk=CHUNK, workers=1
        )
        job = StagingJob(request).start()
        assert job.prepared.wait(10)
        job.cancel()
    assert job.opened is not None
    source = StoredSnapshot(*job.opened)
    file = source.open("model-00002-of-00002.safetensors")
    with pytest.raises(StagingStopped, match="nobody is staging"):
        file.wait(0, file.size)
    file.close()
    source.close()


def test_a_full_disk_is_known_before_anything_is_fetched(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        with pytest.raises(NoSpace, match=r"\d+ bytes are missing") as refused:
            stage_small(f"{server.url}/model", root, limits=StagerLimits(reserve=1 << 60))
        assert refused.value.missing > 1 << 59
        assert sent(server) < 100_000  # headers only


def test_include_and_ignore_choose_files_and_say_what_was_skipped(root: Path) -> None:
    more = {**MODEL, "pytorch_model.bin": b"x" * 1000, "notes.txt": b"n"}
    with FaultyServer(below("model", more)) as server:
        report = stage_small(f"{server.url}/model", root)
        assert {s.path: s.why for s in report.skipped} == {
            "pytorch_model.bin": "the weights are there as safetensors"
        }
        chosen = Selection(include=("*.json", "*.txt"), ignore=("config*",))
        other = stage_small(f"{server.url}/model", root, selection=chosen)
        assert other.files == 1
        assert server.bytes_sent("model/pytorch_model.bin") == 0


def test_trust_domains_share_nothing(root: Path) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        one = stage_small(f"{server.url}/model", root)
        server.clear()
        other = stage_small(f"{server.url}/model", root, domain="tenant")
        assert sent(server) == SIZE
        assert one.snapshot != other.snapshot
        with Store.open(root, writable=False) as store:
            assert oct(store.domain("tenant").path.stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("torn", ["map", "digests", "partial", "lock", "grid"])
def test_a_young_object_torn_by_a_power_loss_is_made_again(root: Path, torn: str) -> None:
    refused = [Fault("status", path="*.safetensors", status=403, nth=nth) for nth in range(9, 99)]
    with FaultyServer(below("model", MODEL), faults=refused) as server:
        with pytest.raises(AccessDenied):
            stage_small(f"{server.url}/model", root)
        for folder in root.glob("domains/default/objects/*"):
            if torn == "lock":
                (folder / torn).unlink()
            elif not (folder / "data").exists():
                (folder / torn).write_bytes(b"")
        server.faults = ()
        stage_small(f"{server.url}/model", root)
        assert visible(root) == MODEL
        for folder in root.glob("domains/default/objects/*"):
            assert ObjectFolder(folder).spec().id == folder.name
