"""Only plain relative paths that can lie in one folder together are ever written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.faulty_server import FaultyServer
from support.models import stage_small

from headrace.cache.errors import UnsafePath
from headrace.cache.paths import MAX_FILES, check_path, check_size, check_tree

GOOD = [
    "a",
    "a/b.c",
    "model-00001-of-00002.safetensors",
    "ü/模型.json",
    "...",
    "a..b/.c",
    "with space",
    "x" * 255,
]
BAD = {
    "": "empty",
    "/a": "absolute",
    "//a": "absolute",
    ".": r"'\.'",
    "..": r"'\.\.'",
    "a/..": r"'\.\.'",
    "../a": r"'\.\.'",
    "a/./b": r"'\.'",
    "a//b": "''",
    "a/": "''",
    "a\0b": "control",
    "a\nb": "control",
    "a\x7f": "control",
    "a\\b": "backslash",
    "\udcff": "Unicode",
    "x" * 256: "longer than 255",
    "/".join(["x" * 100] * 11): "longer than 1024",
}


@pytest.mark.parametrize("path", GOOD)
def test_plain_paths_are_accepted(path: str) -> None:
    assert check_path(path, "the manifest") == path


@pytest.mark.parametrize(("path", "why"), BAD.items())
def test_other_paths_are_refused_with_the_reason(path: str, why: str) -> None:
    with pytest.raises(UnsafePath, match=why) as caught:
        check_path(path, "the manifest")
    assert str(caught.value).startswith("the manifest names the path")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsafePath):
        check_tree(["fine", path], "the manifest")


@given(st.text(max_size=30))
def test_what_is_accepted_stays_inside_its_folder(path: str) -> None:
    try:
        check_path(path, "here")
    except UnsafePath:
        return
    assert os.path.normpath(os.path.join("/base", path)) == f"/base/{path}"
    os.fsencode(path)


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["a", "b", "a"], "'a' twice"),
        (["Model.json", "model.json"], "case or Unicode"),
        (["stra\u00dfe", "strasse"], "case or Unicode"),
        (["\u00e9.json", "e\u0301.json"], "case or Unicode"),
        (["A/x", "a/x"], "case or Unicode"),
        (["a", "a/b"], "both as a file and as a folder"),
        (["a/b/c/d", "a/b"], "both as a file and as a folder"),
    ],
)
def test_names_that_would_collide_are_refused(paths: list[str], why: str) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(UnsafePath, match=why):
            check_tree(order, "the listing")


def test_a_tree_of_good_paths_is_accepted() -> None:
    check_tree([p for p in GOOD if "/" not in p] + ["d/e/f", "d/e/g", "d/h"], "here")


def test_absurdly_many_files_are_refused() -> None:
    with pytest.raises(UnsafePath, match=f"more than {MAX_FILES} files"):
        check_tree((f"{i}" for i in range(MAX_FILES + 1)), "the listing")


@pytest.mark.parametrize("size", [-1, (1 << 50) + 1, 1 << 100])
def test_absurd_sizes_are_refused(size: int) -> None:
    with pytest.raises(UnsafePath, match="no model file has"):
        check_size("a", size, "the manifest")


def test_the_largest_size_is_accepted() -> None:
    assert check_size("a", 1 << 50, "here") == 1 << 50


@pytest.mark.parametrize("names", [("Config.json", "config.json"), ("\u00e9", "e\u0301"), ("back\\slash",)])
def test_a_listing_with_unsafe_names_is_refused_before_anything_is_written(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(UnsafePath, match="the listing of"):
        stage_small(str(folder), tmp_path / "store")
    domain = tmp_path / "store" / "domains" / "default"
    assert list((domain / "snapshots").iterdir()) == list((domain / "objects").iterdir()) == []


def test_a_served_listing_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    """Links of an index page that lead elsewhere are no files of the model."""
    page = b'<a href="../secret.json">s</a> <a href="/etc/passwd">p</a> <a href="good.json">g</a>'
    files = {"model/index.html": page, "model/good.json": b"{}", "secret.json": b"secret"}
    with FaultyServer(files) as server:
        report = stage_small(f"{server.url}/model", tmp_path / "store")
    names = {p.name for p in Path(report.path).rglob("*")}
    assert "good.json" in names
    assert not names & {"secret.json", "passwd"}
