"""The commands that look at a store and change what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import Command
from support.stores import flip, read_files


@pytest.fixture
def staged(headrace: Command, model: Path) -> str:
    """A staged snapshot's id."""
    found = headrace("stage", model, "--json", "-q").json["snapshots"][0]["snapshot"]
    assert isinstance(found, str)
    return found


def test_ls_lists_what_is_staged(headrace: Command, staged: str, model: Path) -> None:
    listed = headrace("ls", "--json").json
    assert listed["root"] == str(headrace.root)
    (one,) = listed["snapshots"]
    assert one["snapshot"] == staged
    assert one["references"] == [f"file://{model}"]
    assert one["staged"]
    assert one["present"] == one["bytes"]
    assert staged[:12] in headrace("ls").out


def test_ls_without_a_store_says_so(headrace: Command) -> None:
    assert "no store" in headrace("ls", code=35).err


@pytest.mark.parametrize("how", ["id", "start", "reference", "path"])
def test_a_snapshot_is_found_by_id_start_reference_or_path(
    headrace: Command, staged: str, model: Path, how: str
) -> None:
    text = {"id": staged, "start": staged[:6], "reference": f"file://{model}/", "path": str(model)}[how]
    shown = headrace("show", text, "--json").json
    assert shown["snapshot"] == staged
    assert {file["path"]: file["bytes"] for file in shown["contents"]} == {
        path: len(data) for path, data in read_files(Path(shown["path"])).items()
    }


def test_show_says_which_store_is_used_and_why(headrace: Command, tmp_path: Path) -> None:
    by_variable = headrace("show", "--json").json
    assert by_variable["root"] == str(headrace.root)
    assert by_variable["chosen_by"] == "$HEADRACE_ROOT"
    assert not by_variable["exists"]
    by_option = headrace("show", "--json", "--root", tmp_path / "other").json
    assert (by_option["root"], by_option["chosen_by"]) == (str(tmp_path / "other"), "--root")


def test_the_configuration_names_the_store_unless_the_environment_does(
    headrace: Command, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'root = "{tmp_path / "configured"}"\ndomain = "team"\n')
    headrace.environ = {"HEADRACE_CONFIG": str(file)}
    assert headrace("show", "--json").json["chosen_by"] == "$HEADRACE_ROOT"
    headrace.environ["HEADRACE_ROOT"] = ""
    shown = headrace("show", "--json").json
    assert (shown["root"], shown["chosen_by"]) == (str(tmp_path / "configured"), "the configuration file")


def test_stores_are_independent(headrace: Command, staged: str, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    headrace("stage", model, "--root", other)
    headrace("rm", staged, "--root", other)
    assert headrace("ls", "--json").json["snapshots"][0]["snapshot"] == staged
    assert headrace("ls", "--json", "--root", other).json["snapshots"] == []


def test_domains_are_apart(headrace: Command, staged: str, model: Path) -> None:
    headrace("stage", model, "--domain", "tenant")
    (theirs,) = headrace("ls", "--json", "--domain", "tenant").json["snapshots"]
    assert theirs["snapshot"] != staged
    assert set(headrace("show", "--json").json["domains"]) == {"default", "tenant"}


def test_what_is_pinned_stays(headrace: Command, staged: str) -> None:
    headrace("pin", staged, "--reason", "production")
    assert "production" in headrace("rm", staged, code=36).err
    headrace("gc", "--max-bytes", "0")
    assert headrace("ls", "--json").json["snapshots"][0]["pinned"] == "production"
    headrace("unpin", staged)
    freed = headrace("rm", staged, "--json").json["removed"]
    assert [one["id"] for one in freed] == [staged]
    assert headrace("ls", "--json").json["snapshots"] == []


def test_a_typo_removes_nothing(headrace: Command, staged: str) -> None:
    headrace("rm", staged, "s3://no/such", code=35)
    assert headrace("ls", "--json").json["snapshots"][0]["snapshot"] == staged


def test_gc_brings_the_store_down_to_a_size(headrace: Command, staged: str) -> None:
    kept = headrace("gc", "--max-bytes", "1GB", "--json").json
    assert kept["removed"] == []
    report = headrace("gc", "--max-bytes", "1MiB", "--json").json
    assert [one["id"] for one in report["removed"]] == [staged]
    assert report["after"] < report["before"]


def test_verify_names_the_bad_chunk_and_repair_fetches_it(
    headrace: Command, staged: str, model: Path
) -> None:
    assert headrace("verify", "--json").json["snapshots"][0]["ok"]
    shard = headrace.root / f"domains/default/snapshots/{staged}/files/model-00002-of-00002.safetensors"
    flip(shard, 100_000)
    found = headrace("verify", staged, "--json", code=20)
    assert found.json["error"]["kind"] == "IntegrityError"
    (bad,) = found.json["snapshots"][0]["bad"]
    assert bad["path"] == shard.name
    assert bad["start"] <= 100_000 < bad["stop"]
    assert "verify --repair" in found.err
    repaired = headrace("verify", model, "--repair", "--json").json["snapshots"][0]
    assert repaired["repair"]["sources"]["origin"] == bad["stop"] - bad["start"]
    assert shard.read_bytes() == (model / shard.name).read_bytes()
    headrace("verify")


def test_what_was_imported_is_exported_as_it_was(headrace: Command, model: Path, tmp_path: Path) -> None:
    imported = headrace("import", model, "--as", "s3://bucket/model", "--json").json["snapshots"][0]
    offline = headrace("stage", "s3://bucket/model", "--revalidate", "never", "--json").json["snapshots"][0]
    assert offline["snapshot"] == imported["snapshot"]
    assert sum(offline["sources"].values()) == 0
    report = headrace("export", "s3://bucket/model", tmp_path / "out", "--json").json
    exported = read_files(tmp_path / "out")
    assert report["files"] == len(exported)
    assert exported == {p: d for p, d in read_files(model).items() if p in exported}
    assert set(read_files(model)) - set(exported) == {"pytorch_model.bin"}
