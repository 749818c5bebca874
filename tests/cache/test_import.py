"""Import adopts what lies on this machine, under the name that it will be asked for by."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support.models import small_model, visible
from support.stores import opened, read_files, write_files

from headrace.cache.deliver import export
from headrace.cache.errors import CheckpointError, NotFound, UsageError
from headrace.cache.importing import hub_snapshot, import_folder
from headrace.cache.origins import ADAPTERS
from headrace.cache.staging import stage
from headrace.cache.verify import verify

SHARDS = sorted(path for path in small_model() if path.endswith(".safetensors"))
INDEX = {"weight_map": {f"layer{i}": shard for i, shard in enumerate(SHARDS)}}
MODEL = {**small_model(), "model.safetensors.index.json": json.dumps(INDEX).encode()}
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def hub_cache(
    folder: Path, files: dict[str, bytes], *, commit: str = COMMIT, main: str | None = COMMIT
) -> Path:
    """What huggingface_hub leaves: blobs, links to them per revision, and refs."""
    model = folder / "models--org--name"
    for path, data in files.items():
        large = path.endswith(".safetensors")
        blob = model / "blobs" / (hashlib.sha256(data) if large else hashlib.sha1(data)).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = model / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + path.count("/"))) / "blobs" / blob.name)
    if main is not None:
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(main)
    return model


def test_import_then_export_gives_the_same_files(tmp_path: Path, root: Path) -> None:
    files = {**MODEL, "tokenizer/vocab.txt": b"a\nb\n", "empty.txt": b""}
    folder = write_files(tmp_path / "model", files)
    report = import_folder(folder, root=root)
    assert report.bytes == sum(map(len, files.values()))
    shutil.rmtree(folder)
    with opened(root, report.snapshot) as it:
        assert verify(it.store, it.domain, it.snapshot).ok
        export(it.snapshot, tmp_path / "out")
    assert read_files(tmp_path / "out") == files


def test_a_folder_is_remembered_by_its_path_or_by_the_name_given(tmp_path: Path, root: Path) -> None:
    folder = write_files(tmp_path / "model", MODEL)
    for name, expected in ((None, f"file://{folder}"), ("s3://bucket/model", "s3://bucket/model")):
        report = import_folder(folder, root=root, name=name)
        with opened(root, report.snapshot) as it:
            assert expected in {n.reference for n in it.snapshot.names()}
            assert it.domain.find(expected).id == report.snapshot


@pytest.mark.parametrize("below", ["", f"snapshots/{COMMIT}"])
def test_a_hub_cache_is_staged_by_its_hub_names_without_the_origin(
    tmp_path: Path, root: Path, below: str
) -> None:
    model = hub_cache(tmp_path / "hub", MODEL)
    imported = import_folder(model / below, root=root)
    assert visible(root) == MODEL
    shutil.rmtree(model)
    for reference in ("hf://org/name", f"hf://org/name@{COMMIT}"):
        report = stage(reference, root=root, revalidate="never")
        assert report.snapshot == imported.snapshot
        assert sum(report.sources.values()) == 0
    assert "hf" in ADAPTERS


def test_an_older_revision_does_not_take_the_name_of_the_current_one(tmp_path: Path, root: Path) -> None:
    model = hub_cache(tmp_path / "hub", MODEL, commit=OLDER)
    hub_cache(tmp_path / "hub", {**MODEL, "config.json": b"{}"})
    report = import_folder(model / "snapshots" / OLDER, root=root)
    with opened(root, report.snapshot) as it:
        assert {n.reference for n in it.snapshot.names()} == {f"hf://org/name@{OLDER}"}


def test_the_only_revision_is_taken_and_of_several_one_must_be_named(tmp_path: Path) -> None:
    model = hub_cache(tmp_path / "hub", MODEL, main=None)
    found = hub_snapshot(model)
    assert found is not None
    assert (found.repository, found.commit, found.current) == ("org/name", COMMIT, True)
    hub_cache(tmp_path / "hub", MODEL, commit=OLDER, main=None)
    with pytest.raises(UsageError, match=f"name one of its.*{COMMIT}, {OLDER}"):
        hub_snapshot(model)
    assert hub_snapshot(tmp_path) is None


def test_blobs_are_adopted_with_their_digests(tmp_path: Path, root: Path) -> None:
    report = import_folder(hub_cache(tmp_path / "hub", MODEL), root=root)
    with opened(root, report.snapshot) as it:
        files = it.snapshot.manifest().by_path
        for path in SHARDS:
            assert files[path].digest == f"sha256:{hashlib.sha256(MODEL[path]).hexdigest()}"


def test_a_cache_that_holds_only_a_part_is_refused(tmp_path: Path, root: Path) -> None:
    part = {path: data for path, data in MODEL.items() if path != SHARDS[1]}
    with pytest.raises(CheckpointError, match=f"names 1 files that are not there \\({SHARDS[1]}\\)"):
        import_folder(hub_cache(tmp_path / "hub", part), root=root)
    broken = hub_cache(tmp_path / "broken", {**MODEL, "model.safetensors.index.json": b"<html>"})
    with pytest.raises(CheckpointError, match="is not an index"):
        import_folder(broken, root=root)
    assert visible(root) == {}


def test_what_is_not_there_is_said_so(tmp_path: Path, root: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        import_folder(tmp_path / "nothing", root=root)


def test_a_changed_folder_is_imported_as_it_is_now(tmp_path: Path, root: Path) -> None:
    folder = write_files(tmp_path / "model", MODEL)
    first = import_folder(folder, root=root, name="s3://bucket/model")
    write_files(folder, {"config.json": b'{"changed": true}'})
    second = import_folder(folder, root=root, name="s3://bucket/model")
    assert second.snapshot != first.snapshot
    with opened(root, second.snapshot) as it:
        assert it.link("config.json").read_bytes() == b'{"changed": true}'
        assert it.domain.find("s3://bucket/model").id == second.snapshot
