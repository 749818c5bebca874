"""`headrace stage`: what it brings, what it says, where it delivers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.command import Command
from support.faulty_server import FaultyServer
from support.models import below
from support.stores import read_files


def staged_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != "pytorch_model.bin"}


def test_json_has_the_documented_fields(headrace: Command, model: Path, files: dict[str, bytes]) -> None:
    result = headrace("stage", model, "--json").json
    (staged,) = result["snapshots"]
    whole = staged_files(files)
    size = sum(map(len, whole.values()))
    assert staged["reference"] == str(model)
    assert staged["files"] == len(whole)
    assert staged["bytes"] == size
    assert staged["chunks"] > 0
    assert staged["seconds"] > 0
    assert staged["sources"] == {"origin": size, "peer": 0, "local": 0}
    assert [skipped["path"] for skipped in staged["skipped"]] == ["pytorch_model.bin"]
    assert read_files(Path(staged["path"])) == whole
    assert Path(staged["path"]).parent.name == staged["snapshot"]


def test_text_says_what_was_staged_where_and_what_was_skipped(headrace: Command, model: Path) -> None:
    result = headrace("stage", model)
    assert "3 files" in result.out
    assert "pytorch_model.bin" in result.out
    assert str(headrace.root) in result.out


def test_what_is_staged_is_not_fetched_again(headrace: Command, model: Path) -> None:
    headrace("stage", model)
    again = headrace("stage", model, "--json").json["snapshots"][0]
    assert sum(again["sources"].values()) == 0
    assert again["chunks"] == 0


def test_files_appear_in_a_destination_as_files_of_their_own(
    headrace: Command, model: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "mnt" / "models"
    result = headrace("stage", model, target, "--json").json["snapshots"][0]
    assert result["destination"] == str(target)
    assert read_files(target) == staged_files(files)
    shard = next(target.glob("*.safetensors"))
    assert os.stat(shard).st_ino != os.stat(Path(result["path"]) / shard.name).st_ino
    assert os.stat(shard).st_nlink == 1


def test_several_sources_go_to_their_destinations(headrace: Command, model: Path, tmp_path: Path) -> None:
    single = model / "model-00001-of-00002.safetensors"
    result = headrace("stage", model, tmp_path / "a", single, tmp_path / "b", "--json").json
    assert [s["destination"] for s in result["snapshots"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert sorted(read_files(tmp_path / "b")) == [single.name]


def test_an_odd_number_of_arguments_is_refused(headrace: Command, model: Path, tmp_path: Path) -> None:
    result = headrace("stage", model, tmp_path / "a", model, code=2)
    assert "SRC and DST in turn" in result.err
    assert not headrace.root.exists()


def test_patterns_choose_files(headrace: Command, model: Path) -> None:
    staged = headrace("stage", model, "--include", "*.bin", "--include", "*.json", "--json").json
    assert staged["snapshots"][0]["files"] == 2
    less = headrace("stage", model, "--ignore", "*.json", "--json").json
    assert less["snapshots"][0]["files"] == 2


def test_chunk_size_and_algorithm_are_the_users_choice(headrace: Command, model: Path) -> None:
    headrace("stage", model, "--chunk-size", "64KiB", "--algorithm", "blake3", "--workers", "1")
    shown = headrace("show", model, "--json").json
    assert shown["algorithm"] == "blake3"
    assert max(file["chunks"] for file in shown["contents"]) > 10


def test_several_processes_stage_together(headrace: Command, files: dict[str, bytes], tmp_path: Path) -> None:
    with FaultyServer(below("m", files)) as server:
        staged = headrace(
            "stage",
            f"{server.url}/m/",
            "--workers",
            "2",
            "--connections",
            "2",
            "--chunk-size",
            "64KiB",
            "--json",
        ).json["snapshots"][0]
        assert read_files(Path(staged["path"])) == staged_files(files)
        assert sum(staged["sources"].values()) == staged["bytes"]


@pytest.mark.parametrize("when", ["sometimes", "5", "10 m"])
def test_an_unknown_age_is_refused(headrace: Command, model: Path, when: str) -> None:
    assert "revalidate" in headrace("stage", model, "--revalidate", when, code=2).err
