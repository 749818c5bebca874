"""Which files make a checkpoint, and what is said when they do not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.safetensors_files import Entry, entry, file_bytes, write_sharded

from headrace.cache.errors import CheckpointError, MissingTensor, UnsafePath
from headrace.loader import DirectorySource, load
from headrace.loader.checkpoint import find_checkpoint, parse_index

A, B, C = entry("a", "F32", (3,)), entry("b", "F32", (4,)), entry("c", "F32", (5,))
INDEX = "model.safetensors.index.json"


def files(folder: Path) -> tuple[str, ...]:
    return find_checkpoint(DirectorySource(folder)).files


def fill(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes([Entry(f"t{number}", "U8", (1,), b"x")]))


def test_an_index_decides_which_files_are_read(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x-1.safetensors": [A], "x-2.safetensors": [B]}, INDEX)
    fill(tmp_path, "other.safetensors")
    found = find_checkpoint(DirectorySource(tmp_path))
    assert found.files == ("x-1.safetensors", "x-2.safetensors")
    assert found.left_out == ("other.safetensors",)


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors.index.json", INDEX])
def test_the_only_index_is_used_whatever_its_name(index: str, tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x.safetensors": [A]}, index)
    (tmp_path / "pytorch_model.bin.index.json").write_text("not ours to read")
    assert files(tmp_path) == ("x.safetensors",)


def test_the_model_s_index_goes_before_others(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"c.safetensors": [A]}, "consolidated.safetensors.index.json")
    write_sharded(tmp_path, {"m.safetensors": [A]}, INDEX)
    assert files(tmp_path) == ("m.safetensors",)


def test_several_indexes_are_a_question_to_the_user(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_sharded(tmp_path, {f"{name}.safetensors": [A]}, f"{name}.safetensors.index.json")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        load(tmp_path)
    assert len(load(tmp_path / "two.safetensors.index.json").tensors) == 1


def test_without_an_index_the_top_folder_s_files_are_the_model(tmp_path: Path) -> None:
    fill(tmp_path, "m-2.safetensors", "m-1.safetensors", "sub/not.safetensors", ".hidden/not.safetensors")
    assert files(tmp_path) == ("m-1.safetensors", "m-2.safetensors")


def test_a_second_copy_in_consolidated_form_is_left_out_unless_it_is_the_only_one(tmp_path: Path) -> None:
    fill(tmp_path, "consolidated.safetensors")
    assert files(tmp_path) == ("consolidated.safetensors",)
    fill(tmp_path, "m.safetensors")
    found = find_checkpoint(DirectorySource(tmp_path))
    assert (found.files, found.left_out) == (("m.safetensors",), ("consolidated.safetensors",))


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ((), "check that this is a model's folder"),
        (("pytorch_model.bin", "config.json"), r"only \.bin files: convert"),
        (("unet/m.safetensors", "vae/m.safetensors"), r"name one of its folders \(unet, vae\)"),
    ],
)
def test_a_folder_without_weights_says_what_it_has_instead(
    names: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(CheckpointError, match=hint):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x-1.safetensors": [A], "x-2.safetensors": [B]}, INDEX)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(MissingTensor, match=r"lacks x-2\.safetensors") as caught:
        load(tmp_path)
    assert caught.value.names == ("x-2.safetensors",)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x-1.safetensors": [A, C], "x-2.safetensors": [B]}, INDEX)
    (tmp_path / "x-1.safetensors").write_bytes(file_bytes([A]))
    with pytest.raises(MissingTensor, match=r"x-1\.safetensors .* lacks c, which model") as caught:
        load(tmp_path)
    assert caught.value.names == ("c",)


@pytest.mark.parametrize("index", [INDEX, None])
def test_a_tensor_that_two_shards_have_is_refused(index: str | None, tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x-1.safetensors": [A, C], "x-2.safetensors": [B, C]}, index)
    with pytest.raises(CheckpointError, match="both have a tensor 'c'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a usable index"),
        ("<html>", "not a usable index"),
        ("[" * 100_000, "not a usable index"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no file name for 'a'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "occurs twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'..'"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "is absolute"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "control characters"),
        ('{"weight_map": {"a": "x.bin"}}', "not a .safetensors file"),
    ],
)
def test_an_unusable_index_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_index(text.encode(), "m.index.json")
    assert message in str(caught.value)
    assert "m.index.json" in str(caught.value)


def test_an_index_that_is_not_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a usable index"):
        parse_index(b"\xff\xfe", "m")


def test_shards_in_a_subfolder_are_found(tmp_path: Path) -> None:
    fill(tmp_path, "parts/1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t0": "parts/1.safetensors"}}))
    assert list(load(tmp_path).tensors) == ["t0"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_directory_gives_no_file_outside_itself(path: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafePath):
        DirectorySource(tmp_path).open(path)
