"""Stream directories: small files now, weights while they are loaded, and never a mixture of two revisions."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from support.command import Command
from support.faulty_server import FaultyServer
from support.models import small_model
from support.stores import write_files

from headrace.cache.errors import LoadError, NotFound, OriginChanged
from headrace.cache.staging import stage
from headrace.cache.stream_directory import NAME, is_stream_directory, read_record
from headrace.loader import load, open_source

FILES = {**small_model(), "tokenizer.json": b"{}", "onnx/model.onnx": b"no", "chat/template.jinja": b"hi"}
SHARD = next(path for path in FILES if path.endswith(".safetensors"))


def deliver(reference: str, target: Path, store: Path) -> dict[str, object]:
    command = Command(store.parent, store)
    answer: dict[str, object] = command("stage", "--stream", "--json", reference, target).json["snapshots"][0]
    return answer


def weight_bytes(server: FaultyServer) -> int:
    return sum(request.sent for request in server.log if request.path.endswith(".safetensors"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_files(tmp_path / "plain", FILES)


def test_it_has_the_small_files_and_the_headers_and_no_weights(tmp_path: Path) -> None:
    target = tmp_path / "pod"
    with FaultyServer({f"m/{path}": data for path, data in FILES.items()}, rate=400_000) as server:
        answer = deliver(f"{server.url}/m", target, tmp_path / "store")
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    small = {"config.json", "tokenizer.json", "chat/template.jinja"}
    shards = {path for path in FILES if path.endswith(".safetensors")}
    assert found == small | {f"{path}.header" for path in shards} | {NAME}
    assert all((target / path).read_bytes() == FILES[path] for path in small)
    header = (target / f"{SHARD}.header").read_bytes()
    assert FILES[SHARD].startswith(header)
    assert len(header) < len(FILES[SHARD]) / 2
    assert is_stream_directory(target)
    assert answer["stream"] is True
    assert read_record(target).snapshot == answer["snapshot"]


def test_loading_it_stages_what_is_missing_and_reads_nothing_twice(tmp_path: Path, plain: Path) -> None:
    target, store = tmp_path / "pod", tmp_path / "store"
    with FaultyServer({f"m/{path}": data for path, data in FILES.items()}, rate=2_000_000) as server:
        deliver(f"{server.url}/m", target, store)
        loaded = load(target)
        assert loaded.digest() == load(plain).digest()
        assert loaded.stats.snapshot == read_record(target).snapshot
        after = weight_bytes(server)
        assert load(target).digest() == loaded.digest()
        assert weight_bytes(server) == after


def test_a_directory_of_another_node_finds_its_snapshot_again(tmp_path: Path, plain: Path) -> None:
    target = tmp_path / "pod"
    deliver(f"file://{plain}", target, tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    with contextlib.closing(open_source(target, root=str(tmp_path / "other"))) as source:
        assert source.snapshot == read_record(target).snapshot


def test_a_reference_that_moved_on_is_not_mixed_with_the_old_small_files(tmp_path: Path, plain: Path) -> None:
    target, store = tmp_path / "pod", tmp_path / "store"
    reference = f"file://{plain}"
    stage(reference, root=store)
    deliver(reference, target, store)
    before = load(target).digest()
    write_files(plain, small_model(seed=1))
    stage(reference, root=store)
    # What is complete in the store is the snapshot that the directory names, whatever is newer.
    assert load(target).digest() == before
    with pytest.raises(OriginChanged, match="another revision"):
        open_source(target, root=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not usable"),
        ("[]", "not a headrace snapshot"),
        ('{"format": 99, "reference": "a", "snapshot": "b"}', "newer"),
        ('{"format": 1, "snapshot": "b"}', "no usable reference"),
        ('{"format": 1, "reference": "a", "snapshot": 3}', "no usable snapshot"),
        ('{"format": 1, "reference": "a", "snapshot": "b", "root": ""}', "no usable root"),
    ],
)
def test_a_damaged_record_is_refused_with_what_is_wrong(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(LoadError, match=what):
        load(tmp_path)


def test_without_a_record_it_is_no_stream_directory(tmp_path: Path) -> None:
    assert not is_stream_directory(tmp_path)
    with pytest.raises(NotFound):
        read_record(tmp_path)


@pytest.mark.parametrize("more", [[], ["--include", "*.json", "pod"]])
def test_what_a_stream_directory_cannot_be_is_said(tmp_path: Path, plain: Path, more: list[str]) -> None:
    command = Command(tmp_path, tmp_path / "store")
    assert "--stream" in command("stage", "--stream", f"file://{plain}", *more, code=2).err
