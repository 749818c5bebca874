"""The shape of the source tree: one namespace, imports one way, lists that match the folders, whole wheels."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PORTIONS = ("cache", "prefetch", "loader", "csi", "cli")
# What each portion may import besides itself.
ALLOWED = {
    "cache": set[str](),
    "prefetch": {"cache"},
    "loader": {"cache"},
    "csi": {"cache"},
    "cli": {"cache", "prefetch", "loader", "csi"},
}
MOST_LINES = 600


def modules(root: Path, portion: str) -> list[Path]:
    return sorted((root / portion / "headrace" / portion).rglob("*.py"))


def upward_imports(root: Path) -> Iterator[str]:
    """Each import of a portion that the importing one may not know, as "file:line: portion"."""
    for portion in PORTIONS:
        for path in modules(root, portion):
            for node in ast.walk(ast.parse(path.read_text())):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module == "headrace":
                    names = [f"headrace.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in names:
                    parts = name.split(".")
                    if parts[0] == "headrace" and parts[1:] and parts[1] not in ALLOWED[portion] | {portion}:
                        yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}: {parts[1]}"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


def test_no_portion_hides_the_others() -> None:
    assert not list(CHECKOUT.glob("*/headrace/__init__.py"))
    assert not (CHECKOUT / "headrace").exists()


def test_every_portion_is_a_typed_package() -> None:
    for portion in PORTIONS:
        folder = CHECKOUT / portion / "headrace" / portion
        assert (folder / "__init__.py").is_file(), portion
        assert (folder / "py.typed").is_file(), portion


def test_imports_go_one_way() -> None:
    assert list(upward_imports(CHECKOUT)) == []


@pytest.mark.parametrize(
    "line",
    ["import headrace.loader.api", "from headrace.loader import load", "from headrace import loader"],
)
def test_an_import_the_wrong_way_is_found(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "cache" / "headrace" / "cache"
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(f"def late() -> None:\n    {line}\n")
    assert list(upward_imports(tmp_path)) == ["cache/headrace/cache/planted.py:2: loader"]


def test_modules_have_a_purpose_in_their_name_and_stay_readable() -> None:
    for portion in PORTIONS:
        for path in modules(CHECKOUT, portion):
            assert path.stem not in ("utils", "util", "helpers", "common", "misc"), path
            assert len(path.read_text().splitlines()) < MOST_LINES, path


@pytest.mark.parametrize("portion", ["cache", "prefetch", "loader", "cli"])
def test_the_readme_of_a_portion_names_its_modules(portion: str) -> None:
    text = (CHECKOUT / portion / "README.md").read_text()
    top = (CHECKOUT / portion / "headrace" / portion).glob("[!_]*.py")
    assert [path.stem for path in top if f"`{path.stem}`" not in text] == []


def test_every_list_of_the_project_file_names_every_portion(project: dict[str, Any]) -> None:
    tool = project["tool"]
    on_disk = {p.parent.name for p in CHECKOUT.glob("*/headrace")}
    assert on_disk == set(PORTIONS)
    packages = {f"{name}/headrace" for name in PORTIONS}
    hatch = tool["hatch"]["build"]
    assert set(hatch["dev-mode-dirs"]) == on_disk
    assert set(hatch["targets"]["wheel"]["packages"]) == packages
    assert on_disk <= set(hatch["targets"]["sdist"]["only-include"])
    assert set(tool["ruff"]["src"]) == on_disk
    assert set(tool["ruff"]["namespace-packages"]) == packages
    assert on_disk <= set(tool["mypy"]["files"])
    mypy_path = {p.rpartition("/")[2] for p in tool["mypy"]["mypy_path"].split(":")}
    assert on_disk <= mypy_path
    assert on_disk <= set(tool["pyright"]["include"])
    assert on_disk <= set(tool["pyright"]["extraPaths"])
    assert on_disk <= set(tool["pytest"]["ini_options"]["pythonpath"])
    assert set(tool["coverage"]["run"]["source"]) == on_disk


def test_the_plain_install_is_small(project: dict[str, Any]) -> None:
    names = {line.split(">")[0].split("=")[0] for line in project["project"]["dependencies"]}
    assert names == {"xxhash", "click"}


@pytest.mark.parametrize("portion", PORTIONS)
def test_exported_names_exist_and_are_sorted(portion: str) -> None:
    package = importlib.import_module(f"headrace.{portion}")
    exported = list(getattr(package, "__all__", []))
    assert exported == sorted(exported)
    for name in exported:
        assert getattr(package, name) is not None
        assert not name.startswith("_")


def test_the_wheel_of_the_sdist_has_every_module_and_nothing_else(tmp_path: Path) -> None:
    build(CHECKOUT, "sdist", tmp_path / "sdist")
    (archive,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    build(source, "wheel", tmp_path / "wheel")
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    packed = {n for n in names if not n.partition("/")[0].endswith(".dist-info")}
    expected = {
        path.relative_to(CHECKOUT / portion).as_posix()
        for portion in PORTIONS
        for path in (CHECKOUT / portion / "headrace").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == expected


def build(source: Path, kind: str, into: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
