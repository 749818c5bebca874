"""A faulty origin: transient faults are ridden out, the rest ends in one sentence; nothing wrong shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faulty_server import Fault, FaultyServer
from support.models import (
    CHUNK,
    IMPATIENT,
    PATIENT,
    assert_marks_are_true,
    below,
    published,
    small_model,
    stage_small,
    visible,
)

from headrace.cache.errors import (
    AccessDenied,
    HeadraceError,
    IntegrityError,
    NotFound,
    OriginChanged,
    OriginMisconfigured,
    OriginUnavailable,
    UsageError,
)

MODEL = small_model()
SHARD = "*-00001-of-00002.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(params=["published", "listed"])
def files(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return below("model", published(MODEL) if request.param == "published" else MODEL)


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    with FaultyServer(files) as server:
        yield server


TRANSIENT = {
    "a 500 now and then": [Fault("status", path=SHARD, status=500, probability=0.3)],
    "503 SlowDown at first": [Fault("status", path=SHARD, status=503, retry_after=0.01, first=3)],
    "429 with Retry-After": [Fault("status", path=SHARD, status=429, retry_after=0.01, first=2)],
    "reset before the answer": [Fault("reset", path=SHARD, after=-1, first=3)],
    "reset in the body": [Fault("reset", path=SHARD, after=1000, probability=0.3)],
    "truncated bodies": [Fault("truncate", path=SHARD, after=5000, probability=0.3)],
    "a stall before the headers": [Fault("stall", path=SHARD, after=-1, seconds=20, nth=4)],
    "a stall in the body": [Fault("stall", path=SHARD, after=4096, seconds=20, nth=5)],
    "everything at once": [
        Fault("status", path=SHARD, status=500, probability=0.1),
        Fault("reset", path=SHARD, after=100, probability=0.1),
        Fault("truncate", path=SHARD, after=10, probability=0.1),
    ],
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_faults_are_ridden_out(server: FaultyServer, root: Path, name: str) -> None:
    server.faults = tuple(TRANSIENT[name])
    options = IMPATIENT if "stall" in name else PATIENT
    report = stage_small(f"{server.url}/model", root, options=options)
    assert visible(root) == MODEL
    assert report.sources["origin"] == sum(map(len, MODEL.values()))
    # A stalled answer is logged when it ends, which may be after this.
    assert "stall" in name or any(request.faults for request in server.requests())


FINAL: dict[str, tuple[list[Fault], type[HeadraceError], int]] = {
    "always 500": ([Fault("status", path=SHARD, status=500)], OriginUnavailable, 13),
    "always 503": ([Fault("status", path=SHARD, status=503)], OriginUnavailable, 13),
    "always reset": ([Fault("reset", path=SHARD, after=10)], OriginUnavailable, 13),
    "always truncated": ([Fault("truncate", path=SHARD, after=0)], OriginUnavailable, 13),
    "forbidden": ([Fault("status", path=SHARD, status=403)], AccessDenied, 12),
    "unauthorized": ([Fault("status", path=SHARD, status=401)], AccessDenied, 12),
    "gone midway": ([Fault("status", path=SHARD, status=404)], NotFound, 11),
    "ranges ignored": ([Fault("ignore_range", path=SHARD)], OriginMisconfigured, 15),
    "replaced midway": ([Fault("replace", path=SHARD, nth=6)], OriginChanged, 14),
}


@pytest.mark.parametrize("name", FINAL)
def test_a_fault_that_stays_ends_in_its_error_and_shows_nothing(
    server: FaultyServer, files: dict[str, bytes], root: Path, name: str
) -> None:
    faults, kind, code = FINAL[name]
    server.faults = tuple(faults)
    with pytest.raises(kind) as ended:
        stage_small(f"{server.url}/model", root)
    assert ended.value.exit_code == code
    message = str(ended.value)
    assert "model" in message
    assert "\n" not in message
    assert visible(root) == {}
    assert_marks_are_true(root, MODEL) if root.exists() and (root / "format").exists() else None


def test_a_wrong_content_range_is_never_written(server: FaultyServer, root: Path) -> None:
    server.faults = (Fault("wrong_range", path=SHARD),)
    with pytest.raises(HeadraceError):
        stage_small(f"{server.url}/model", root)
    assert visible(root) == {}
    assert_marks_are_true(root, MODEL)


def test_the_next_run_fetches_only_what_is_missing(server: FaultyServer, root: Path) -> None:
    server.faults = (
        Fault("status", path=SHARD, status=403, nth=8),
        Fault("status", path=SHARD, status=403, nth=9),
    )
    with pytest.raises(AccessDenied):
        stage_small(f"{server.url}/model", root)
    kept = assert_marks_are_true(root, MODEL)
    assert kept > 0
    server.faults = ()
    server.clear()
    report = stage_small(f"{server.url}/model", root)
    assert visible(root) == MODEL
    size = sum(map(len, MODEL.values()))
    assert report.sources["origin"] < size
    fetched_again = sum(server.bytes_sent(f"model/{path}") for path in MODEL)
    assert fetched_again <= size - kept * 100  # chunks are at least the small header


def test_corrupt_bytes_against_a_manifest_are_fetched_again(root: Path) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        server.faults = (Fault("corrupt", path=SHARD, at=2 * CHUNK, first=1),)
        server.faults = (Fault("corrupt", path=SHARD, at=2 * CHUNK, length=9, nth=4),)
        stage_small(f"{server.url}/model", root)
        assert visible(root) == MODEL


def test_corrupt_bytes_that_stay_name_file_chunk_and_remedy(root: Path) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        server.faults = (Fault("corrupt", path=SHARD, at=2 * CHUNK + 5),)
        with pytest.raises(
            IntegrityError, match=r"00001-of-00002\.safetensors: chunk \d+ .*publish"
        ) as ended:
            stage_small(f"{server.url}/model", root)
        assert ended.value.exit_code == 20
        assert visible(root) == {}
        assert_marks_are_true(root, MODEL)
        server.faults = ()
        stage_small(f"{server.url}/model", root)
        assert visible(root) == MODEL


def test_an_object_replaced_midway_keeps_the_old_bytes_apart_from_the_new(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        server.faults = (
            Fault("replace", path=SHARD, nth=8, body=small_model(1)["model-00001-of-00002.safetensors"]),
        )
        with pytest.raises(OriginChanged):
            stage_small(f"{server.url}/model", root)
        new = {path: server.files[f"model/{path}"] for path in MODEL}
        assert new != MODEL
        server.faults = ()
        stage_small(f"{server.url}/model", root)
        assert visible(root) == new


def test_with_the_origin_down_what_is_staged_serves_with_a_warning(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        url = f"{server.url}/model"
        stage_small(url, root)
    report = stage_small(url, root)
    assert report.sources == {"origin": 0, "peer": 0, "local": 0}
    assert any("cannot be reached" in note for note in report.notes)


def test_a_remembered_resolution_asks_the_origin_nothing(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        url = f"{server.url}/model"
        stage_small(url, root)
        server.clear()
        for revalidate in ("never", "1h"):
            report = stage_small(url, root, revalidate=revalidate)
            assert report.chunks == 0
        assert server.log == []
        stage_small(url, root, revalidate="always")
        assert server.log != []


def test_never_asking_still_asks_once_and_says_so(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        report = stage_small(f"{server.url}/model", root, revalidate="never")
        assert any("asked once" in note for note in report.notes)


def test_a_policy_that_is_none_is_refused_the_first_time(root: Path) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        with pytest.raises(UsageError, match="always, never, or an age"):
            stage_small(f"{server.url}/model", root, revalidate="sometimes")
        assert server.log == []
