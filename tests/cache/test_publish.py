"""Publishing uploads a folder, describes it truly, and refuses what no node could stage."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.models import manifest_of, small_model, stage_small, visible
from support.seaweedfs import SeaweedFS

from headrace.cache import manifest
from headrace.cache.errors import (
    CheckpointError,
    IntegrityError,
    NotFound,
    OriginChanged,
    UnsafePath,
    UsageError,
)
from headrace.cache.manifest import PUBLISHED_NAME, Manifest
from headrace.cache.origins import OriginOptions, open_origin
from headrace.cache.progress import Progress
from headrace.cache.publish import publish
from headrace.cache.reference import parse

CHUNK = 64 * 1024
MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", MODEL)


def at(target: Path) -> Manifest:
    return manifest.parse((target / PUBLISHED_NAME).read_bytes(), "here")


@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3"])
def test_the_manifest_describes_every_byte(folder: Path, tmp_path: Path, algorithm: str) -> None:
    report = publish(folder, str(tmp_path / "out"), chunk=CHUNK, algorithm=algorithm)
    assert at(tmp_path / "out") == manifest_of(MODEL, chunk=CHUNK, algorithm=algorithm)
    assert {p: (tmp_path / "out" / p).read_bytes() for p in MODEL} == MODEL
    assert (report.files, report.bytes, report.uploaded) == (len(MODEL), SIZE, SIZE)
    assert report.digest == at(tmp_path / "out").digest
    assert report.predecessor is report.key is None


def test_empty_files_and_folders_of_folders_are_published(tmp_path: Path) -> None:
    files = {"a/b/c.json": b"{}", "a/empty": b"", "top": b"x" * 200_000}
    publish(write(tmp_path / "model", files), str(tmp_path / "out"), chunk=CHUNK)
    stage_small(str(tmp_path / "out"), tmp_path / "store")
    assert visible(tmp_path / "store") == files


def test_a_published_folder_is_staged_as_it_was(folder: Path, tmp_path: Path) -> None:
    publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    report = stage_small(str(tmp_path / "out"), tmp_path / "store", require="published")
    assert visible(tmp_path / "store") == MODEL
    assert report.sources["origin"] == SIZE


@pytest.mark.service
def test_publishing_to_an_object_store(
    folder: Path, tmp_path: Path, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.environ.items():
        monkeypatch.setenv(name, value)
    client = seaweedfs.client()
    try:
        client.create_bucket(Bucket="published")
        progress = Progress()
        report = publish(folder, "s3://published/models/one", chunk=CHUNK, progress=progress)
        body = client.get_object(Bucket="published", Key=f"models/one/{PUBLISHED_NAME}")["Body"]
        with body:
            assert manifest.parse(body.read(), "s3").digest == report.digest
    finally:
        client.close()
    assert progress.done == progress.total == SIZE
    options = OriginOptions.from_env("s3")
    stage_small("s3://published/models/one", tmp_path / "store", require="published", options=options)
    assert visible(tmp_path / "store") == MODEL


def test_a_folder_can_be_published_where_it_lies(folder: Path) -> None:
    before = {p: (folder / p).stat().st_mtime_ns for p in MODEL}
    report = publish(folder, str(folder), chunk=CHUNK)
    assert report.uploaded == 0
    assert at(folder) == manifest_of(MODEL, chunk=CHUNK)
    assert {p: (folder / p).stat().st_mtime_ns for p in MODEL} == before


def test_a_new_revision_names_the_one_before_it(folder: Path, tmp_path: Path) -> None:
    first = publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    (folder / "config.json").write_bytes(b"{}")
    second = publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    assert second.predecessor == at(tmp_path / "out").predecessor == first.digest
    elsewhere = publish(folder, str(tmp_path / "other"), chunk=CHUNK, predecessor=first.digest)
    assert elsewhere.digest == second.digest
    assert publish(folder, str(tmp_path / "none"), chunk=CHUNK, predecessor=None).predecessor is None


def test_the_same_files_again_give_the_same_manifest(folder: Path, tmp_path: Path) -> None:
    first = publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    assert publish(folder, str(tmp_path / "out"), chunk=CHUNK).digest == first.digest


def test_files_of_an_old_revision_are_named_as_left_over(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "out", {"model-00003-of-00003.safetensors": b"old", "notes.txt": b""})
    report = publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    assert report.leftover == ("model-00003-of-00003.safetensors", "notes.txt")
    stage_small(str(tmp_path / "out"), tmp_path / "store")
    assert visible(tmp_path / "store") == MODEL


def test_patterns_choose_what_is_published(tmp_path: Path) -> None:
    files = {
        **MODEL,
        "pytorch_model.bin": b"x",
        ".git/config": b"x",
        ".cache/y": b"x",
        "notes/todo.txt": b"x",
    }
    folder = write(tmp_path / "model", files)
    publish(folder, str(tmp_path / "all"), chunk=CHUNK)
    assert set(at(tmp_path / "all").by_path) == {*MODEL, "pytorch_model.bin", "notes/todo.txt"}
    report = publish(folder, str(tmp_path / "some"), chunk=CHUNK, ignore=["notes/", "*.bin"])
    assert set(at(tmp_path / "some").by_path) == set(MODEL)
    assert {"pytorch_model.bin", "notes/todo.txt"} <= {s.path for s in report.skipped}
    publish(folder, str(tmp_path / "one"), chunk=CHUNK, include=["*.json"])
    assert set(at(tmp_path / "one").by_path) == {"config.json"}


def test_links_inside_the_folder_are_published_as_files(folder: Path, tmp_path: Path) -> None:
    (folder / "alias.json").symlink_to("config.json")
    publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    assert not (tmp_path / "out" / "alias.json").is_symlink()
    assert (tmp_path / "out" / "alias.json").read_bytes() == MODEL["config.json"]


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePath, match="outside"):
        publish(folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names", [("A.json", "a.json"), ("back\\slash",), ("line\nbreak",), ("\u00e9", "e\u0301")]
)
def test_names_that_no_node_could_stage_are_refused(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(UnsafePath):
        publish(folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafePath, match="pipe"):
        publish(folder, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (MODEL["model-00002-of-00002.safetensors"][:-1], "truncated"),
        (b"", "empty"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_before_anything_is_uploaded(
    folder: Path, tmp_path: Path, data: bytes, says: str
) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        publish(folder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile_leaves_no_manifest(folder: Path, tmp_path: Path) -> None:
    """The writer goes on for as long as it takes; the largest file is uploaded last."""
    big = folder / "big.bin"
    big.write_bytes(bytes(48 << 20))
    done = threading.Event()

    def keep_writing() -> None:
        with big.open("r+b", buffering=0) as file:
            while not done.is_set():
                file.seek(0)
                file.write(os.urandom(64))

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with pytest.raises(OriginChanged, match=r"big\.bin.*no manifest was written"):
            publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    finally:
        done.set()
        writer.join()
    assert not (tmp_path / "out" / PUBLISHED_NAME).exists()


def test_until_a_new_manifest_is_written_the_old_one_stands(folder: Path, tmp_path: Path) -> None:
    first = publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    assert at(tmp_path / "out").digest == first.digest


def test_readers_of_an_overwritten_revision_stop_and_never_mix(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(folder, str(out), chunk=CHUNK)
    old = (out / PUBLISHED_NAME).read_bytes()
    write(folder, small_model(seed=1))
    publish(folder, str(out), chunk=CHUNK)
    # As after a crash between the files of the new revision and its manifest.
    (out / PUBLISHED_NAME).write_bytes(old)
    with pytest.raises(IntegrityError, match="publish the model again"):
        stage_small(str(out), tmp_path / "store")
    assert visible(tmp_path / "store") == {}


def test_an_interrupt_stops_at_once_and_leaves_no_manifest(folder: Path, tmp_path: Path) -> None:
    """A sparse file of 1 TiB takes minutes to hash; the program has to end before it is read."""
    with (folder / "big.bin").open("wb") as file:
        file.truncate(1 << 40)
    program = (
        "import sys\n"
        "from headrace.cache.errors import Interrupted\n"
        "from headrace.cache.publish import publish\n"
        "try: publish(sys.argv[1], sys.argv[2])\n"
        "except Interrupted as error: print(error)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(out)], stdout=subprocess.PIPE, text=True
    )
    with process:
        while not (out / "config.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert "interrupted and no manifest was written" in said
    assert not (out / PUBLISHED_NAME).exists()


def test_an_interrupted_upload_to_a_folder_ends_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "big.bin", tmp_path / "out"
    with source.open("wb") as file:
        file.truncate(1 << 40)
    out.mkdir()

    async def interrupted() -> None:
        origin = open_origin(parse(str(out)))
        task = asyncio.ensure_future(origin.put("big.bin", str(source)))
        while not list(out.iterdir()):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await origin.close()

    asyncio.run(interrupted())
    deadline = time.monotonic() + 60
    while list(out.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_origin_that_cannot_be_written_is_a_usage_error(folder: Path) -> None:
    with FaultyServer({"model/x": b"x"}) as server, pytest.raises(UsageError, match="published to"):
        publish(folder, f"{server.url}/model")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chunk": 1000}, "chunk size"),
        ({"algorithm": "md5"}, "md5"),
        ({"predecessor": "latest"}, "manifest digest"),
        ({"include": ["*.onnx"]}, "nothing to publish"),
        ({"sign": Path("no-such-key.pem")}, "openssl genpkey"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_before_anything_is_uploaded(
    folder: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        publish(folder, str(tmp_path / "out"), **change)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_a_file_and_a_nested_target_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        publish(tmp_path / "missing", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="is a file"):
        publish(folder / "config.json", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="inside"):
        publish(folder, str(folder / "out"))


def test_whole_file_digests_are_sha256(folder: Path, tmp_path: Path) -> None:
    publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    for file in at(tmp_path / "out").files:
        assert file.digest == f"sha256:{hashlib.sha256(MODEL[file.path]).hexdigest()}"
