"""By default the weights are staged in one format only; patterns say otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import small_model, stage_small, visible

from headrace.cache.errors import NotFound
from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.selection import matches, outer, select
from headrace.cache.snapshot import Selection

MODEL = small_model()
OTHERS = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "model.pt",
    "model.ckpt",
    "model-q4.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "onnx/model.onnx",
]
KEPT = ["config.json", "tokenizer.model", "tokenizer.json", "vocab.txt", "modeling.py", "chat_template.jinja"]


def kept(paths: list[str], include: tuple[str, ...] = (), ignore: tuple[str, ...] = ()) -> set[str]:
    return set(select([(p, 1) for p in paths], Selection(include, ignore))[0])


def test_with_safetensors_other_weights_are_skipped_and_said() -> None:
    files = [(p, 7) for p in ["model.safetensors", *OTHERS, *KEPT]]
    paths, skipped = select(files, Selection())
    assert paths == ["model.safetensors", *KEPT]
    assert {s.path for s in skipped} == set(OTHERS)
    assert all(s.size == 7 and s.why == "the weights are there as safetensors" for s in skipped)


def test_without_safetensors_other_weights_are_kept() -> None:
    assert kept([*OTHERS, *KEPT]) == {*OTHERS, *KEPT}


def test_the_same_weights_under_another_name_are_skipped() -> None:
    assert kept(["consolidated.safetensors", "model.safetensors"]) == {"model.safetensors"}
    sharded = [
        "consolidated-00001.safetensors",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert kept(sharded) == set(sharded[1:])
    assert kept(["consolidated.safetensors", "params.json"]) == {"consolidated.safetensors", "params.json"}
    # Not beside it, so perhaps another model.
    apart = ["other/consolidated.safetensors", "model.safetensors"]
    assert kept(apart) == set(apart)


@pytest.mark.parametrize(
    "path", [".gitattributes", ".git/config", ".cache/x", "a/.cache/x", ".DS_Store", "a/._b"]
)
def test_what_is_no_part_of_a_model_is_skipped(path: str) -> None:
    assert kept([path, "config.json"]) == {"config.json"}


def test_the_manifest_is_neither_staged_nor_said_to_be_skipped() -> None:
    for selection in (Selection(), Selection(("*",)), Selection((PUBLISHED_NAME,))):
        paths, skipped = select([(PUBLISHED_NAME, 1)], selection)
        assert not paths
        assert not skipped


def test_include_replaces_the_defaults_and_ignore_comes_on_top() -> None:
    paths = ["model.safetensors", "model.bin", "config.json", "onnx/model.onnx", "onnx/config.json"]
    assert kept(paths, include=("*.bin",)) == {"model.bin"}
    assert kept(paths, include=("onnx/",)) == {"onnx/model.onnx", "onnx/config.json"}
    assert kept(paths, include=("*.json",), ignore=("onnx/",)) == {"config.json"}
    assert kept(paths, ignore=("*.json",)) == {"model.safetensors"}
    assert kept(paths, include=("*",)) == set(paths)


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("a/b.json", "*.json", True),
        ("a/b.json", "b.json", True),
        ("a/b.json", "a/*", True),
        ("a/b.json", "a/", True),
        ("ab/b.json", "a/", False),
        ("a/b.json", "B.json", False),
        ("b.json", "[ab].json", True),
    ],
)
def test_patterns_fit_the_path_or_its_last_name(path: str, pattern: str, fits: bool) -> None:
    assert matches(path, [pattern]) is fits


def test_patterns_for_an_archive_mean_its_members() -> None:
    wanted = Selection(("*.json",))
    for name in ("model.tar", "m/model.tar.gz", "model.tgz"):
        assert outer([name], wanted) == outer([name, PUBLISHED_NAME], wanted) == Selection()
    assert outer(["model.tar", "config.json"], wanted) == wanted
    assert outer(["model.json"], wanted) == wanted


def test_what_was_skipped_is_reported_and_each_selection_is_a_snapshot(tmp_path: Path) -> None:
    folder, root = tmp_path / "model", tmp_path / "store"
    folder.mkdir()
    for path, data in {**MODEL, "pytorch_model.bin": b"pickle"}.items():
        (folder / path).write_bytes(data)
    report = stage_small(str(folder), root)
    assert [s.path for s in report.skipped] == ["pytorch_model.bin"]
    assert visible(root) == MODEL
    other = stage_small(str(folder), root, selection=Selection(("*.bin",)))
    assert other.snapshot != report.snapshot
    assert [p.name for p in Path(other.path).iterdir()] == ["pytorch_model.bin"]
    # Each selection is remembered by itself.
    assert stage_small(str(folder), root, revalidate="never").snapshot == report.snapshot


def test_patterns_that_leave_nothing_are_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    with pytest.raises(NotFound, match=r"config\.json: no include pattern fits.*check"):
        stage_small(str(tmp_path / "model"), tmp_path / "store", selection=Selection(("*.onnx",)))
