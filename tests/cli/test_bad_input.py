"""Whatever is wrong with what it is given: one clear sentence, a stable exit code, and nothing lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.command import Command
from support.mounts import needs_root, read_only, tmpfs
from support.stores import read_files

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234567\n"
HTML = b"<!DOCTYPE html>\n<html><body>503 Service Unavailable</body></html>\n"


@pytest.fixture
def mounts() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def assert_refused(headrace: Command, code: int, *args: str | Path) -> str:
    """The command ends with `code` and one sentence, the same on both streams; the sentence."""
    result = headrace(*args, "--json", "--quiet", code=code)
    message = result.json["error"]["message"]
    assert isinstance(message, str)
    assert result.json["error"]["exit_code"] == code
    assert result.err == f"headrace: {message}\n"
    assert "Traceback" not in result.err
    return message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02}q\x00." * 100, "safetensors"),
        (LFS, "LFS"),
        (HTML, "HTML"),
        (b"", "empty"),
    ],
    ids=["not safetensors", "LFS pointer", "HTML page", "empty"],
)
@pytest.mark.parametrize("verb", ["stage", "load", "publish"])
def test_what_is_no_safetensors_file_is_named(
    headrace: Command, model: Path, tmp_path: Path, verb: str, content: bytes, said: str
) -> None:
    (model / SHARD).write_bytes(content)
    more = [tmp_path / "published"] if verb == "publish" else []
    message = assert_refused(headrace, 24, verb, model, *more)
    assert SHARD in message
    assert said in message
    assert not (tmp_path / "published").exists() or not read_files(tmp_path / "published")


@pytest.mark.parametrize("verb", ["stage", "load"])
def test_a_truncated_shard_is_named(headrace: Command, model: Path, verb: str) -> None:
    data = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(data[:-1000])
    message = assert_refused(headrace, 24, verb, model)
    assert SHARD in message
    assert "1000 of 1327104 bytes" in message


def test_a_shard_that_the_index_names_and_is_not_there_is_named(headrace: Command, model: Path) -> None:
    names = {"a.weight": "model-00001-of-00003.safetensors", "b.weight": "model-00003-of-00003.safetensors"}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert "model-00003-of-00003.safetensors" in assert_refused(headrace, 41, "load", model)


def test_tensors_that_are_not_there_are_named(headrace: Command, model: Path) -> None:
    assert "no.such.weight" in assert_refused(headrace, 41, "load", model, "--name", "no.such.weight")


@pytest.mark.parametrize("verb", ["stage", "load"])
def test_an_empty_prefix_is_named(headrace: Command, tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in assert_refused(headrace, 11, verb, f"file://{tmp_path}/empty")


def test_a_path_that_is_not_there_is_named(headrace: Command, tmp_path: Path) -> None:
    assert "nowhere" in assert_refused(headrace, 11, "stage", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("reference", "suggestion"),
    [("s4://bucket/model", "s3://"), ("htps://host/model", "https://"), ("hff://org/name", "hf://")],
)
def test_a_typo_in_the_scheme_gets_a_suggestion(headrace: Command, reference: str, suggestion: str) -> None:
    assert suggestion in assert_refused(headrace, 2, "stage", reference)
    assert suggestion in assert_refused(headrace, 2, "load", reference)


@pytest.mark.parametrize("reference", ["", " ", "s3://", "hf://org/name@", "s3:bucket/model"])
def test_what_is_no_reference_is_refused(headrace: Command, reference: str) -> None:
    assert_refused(headrace, 2, "stage", reference)


def test_a_folder_with_other_files_does_not_become_a_store(headrace: Command, model: Path) -> None:
    before = read_files(model)
    assert "not a headrace store" in assert_refused(headrace, 2, "stage", model, "--root", model)
    assert read_files(model) == before


def test_a_store_of_a_newer_version_is_left_alone(headrace: Command, model: Path) -> None:
    headrace("stage", model)
    (headrace.root / "format").write_text('{"format": 99}')
    before = read_files(headrace.root)
    for args in (("stage", model), ("ls",), ("gc",), ("verify",)):
        assert "upgrade headrace" in assert_refused(headrace, 32, *args)
    assert read_files(headrace.root) == before


@needs_root
def test_another_users_store_is_left_alone(headrace: Command, model: Path) -> None:
    headrace("stage", model)
    os.chown(headrace.root, 12345, 12345)
    assert "12345" in assert_refused(headrace, 33, "stage", model)
    assert headrace("ls", "--json").json["snapshots"][0]["staged"]


@needs_root
def test_a_read_only_store_still_serves_who_reads(headrace: Command, model: Path, mounts: ExitStack) -> None:
    headrace("stage", model)
    mounts.enter_context(read_only(headrace.root))
    assert "read-only" in assert_refused(headrace, 33, "stage", model)
    snapshot = headrace("ls", "--json").json["snapshots"][0]
    assert headrace("load", snapshot["path"], "--json").json["tensors"] == 24


@needs_root
def test_a_full_disk_says_how_much_is_missing_and_the_next_run_resumes(
    headrace: Command, model: Path, mounts: ExitStack, tmp_path: Path
) -> None:
    disk = mounts.enter_context(tmpfs(tmp_path / "disk", 1 << 20))
    message = assert_refused(headrace, 31, "stage", model, "--root", disk / "store")
    assert "MB" in message or "MiB" in message or "bytes" in message


@pytest.mark.parametrize("size", ["many", "16QB", "-1", ""])
def test_what_is_no_size_is_refused(headrace: Command, size: str) -> None:
    assert "size" in assert_refused(headrace, 2, "gc", "--max-bytes", size)


def test_a_wrong_configuration_is_named(headrace: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('revalidate = "now and then"\n')
    headrace.environ = {"HEADRACE_CONFIG": str(file)}
    assert "now and then" in assert_refused(headrace, 2, "stage", model)
    headrace.environ = {"HEADRACE_CONFIG": str(tmp_path / "missing.toml")}
    assert "missing.toml" in assert_refused(headrace, 2, "stage", model)
