"""`safe_open` and `load_file` against safetensors' own, call for call."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from support.safetensors_files import entry, file_bytes

from headrace.cache.errors import CheckpointError, HeadraceError, LoadError, MissingTensor, UsageError
from headrace.cache.safetensors import DTYPE_BITS
from headrace.loader import load_file, safe_open

BACKENDS = ("mmap", "pread")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tensors = {
        "matrix": torch.arange(24.0).reshape(4, 6),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "vector": torch.arange(7, dtype=torch.bfloat16),
        "wide": torch.arange(64 * 6, dtype=torch.int32).reshape(64, 6),
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "k": "v"})
    return path


def both(path: Path, backend: str, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    with safe_open(path, "pt", backend=backend) as ours, safetensors.safe_open(path, "pt") as theirs:
        return call(ours), call(theirs)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and ours.stride() == theirs.stride()
        and ours.device == theirs.device
        and torch.equal(ours, theirs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_order_and_metadata_are_those_of_safetensors(path: Path, backend: str) -> None:
    for call in ("keys", "offset_keys", "metadata"):
        ours, theirs = both(path, backend, methodcaller(call))
        assert ours == theirs
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_are_those_of_safetensors(path: Path, backend: str) -> None:
    for name in ("matrix", "scalar", "empty", "vector", "wide"):
        ours, theirs = both(path, backend, methodcaller("get_tensor", name))
        assert same(ours, theirs)
        assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    ours, theirs = both(path, backend, methodcaller("get_tensors"))
    assert list(ours) == list(theirs)
    assert all(same(ours[name], theirs[name]) for name in theirs)


INDEXES: dict[str, Any] = {
    "all": ..., "full": slice(None), "int": 1, "negative": -1, "outside": 9, "outside negative": -9,
    "pair": (1, 2), "mixed": (slice(1, 3), 2), "dots first": (..., 1), "dots last": (1, ...),
    "step": slice(0, 4, 2), "backward": slice(None, None, -1), "list": [0, 2], "list second": (slice(None), [1, 3]),
    "none": None, "tensor": torch.tensor([0, 1]), "too many": (1, 2, 3), "nothing": (), "empty": slice(3, 1),
    "past": slice(2, 99), "from end": slice(-2, None), "true": True, "float": 1.0, "list outside": [9],
    "zero step": slice(0, 4, 0), "both": (slice(1, 2), ..., slice(0, 1)), "columns": (slice(None), slice(1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["matrix", "scalar", "empty", "vector"])
@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_slices_are_those_of_safetensors(path: Path, name: str, index: Any, backend: str) -> None:
    def take(opened: Any) -> Any:
        part = opened.get_slice(name)
        assert (part.get_shape(), part.get_dtype()) == (
            list(opened.get_tensor(name).shape),
            "BF16" if name == "vector" else "F32",
        )
        try:
            return part[index]
        except (IndexError, ValueError, TypeError) as error:
            return type(error)

    ours, theirs = both(path, backend, take)
    if isinstance(theirs, torch.Tensor):
        assert same(ours, theirs)
    else:
        assert ours is theirs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_what_safetensors_makes_of_it(dtype: str, backend: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes([entry("a", dtype, (4, 2)), entry("b", dtype, (8,))], shift=1))
    try:
        theirs = safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        assert dtype.startswith("F6_")
        with pytest.raises(LoadError, match=rf"'a' is {dtype} of shape \[4, 2\], which torch"):
            load_file(path, backend=backend)
        return
    ours = load_file(path, backend=backend)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        assert torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))


def test_the_signatures_are_those_of_safetensors() -> None:
    theirs = inspect.signature(safetensors.torch.load_file)
    ours = inspect.signature(load_file)
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    opened = inspect.signature(safe_open)
    assert [(p.name, p.kind) for p in opened.parameters.values()] == [
        ("filename", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("framework", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("device", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("backend", inspect.Parameter.KEYWORD_ONLY),
    ]
    public = {name for name in dir(safetensors.safe_open) if not name.startswith("_")}
    assert public <= set(dir(safe_open))


def test_an_open_file_is_hashable_and_closes(path: Path) -> None:
    opened = safe_open(str(path), framework="torch")
    assert {opened: 1}[opened] == 1
    part = opened.get_slice("matrix")
    with opened as same_one:
        assert same_one is opened
        kept = opened.get_tensor("matrix")
    assert torch.equal(kept, torch.arange(24.0).reshape(4, 6))
    for call in (opened.keys, opened.metadata, lambda: opened.get_tensor("matrix"), lambda: part[:]):
        with pytest.raises(LoadError, match="is closed"):
            call()


def test_a_tensor_can_be_saved_alone(path: Path) -> None:
    with safe_open(path, "pt") as opened:
        file = io.BytesIO()
        torch.save(opened.get_tensor("scalar"), file)
    assert len(file.getvalue()) < 3000


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (FileNotFoundError, lambda path: safe_open(path.parent / "nothing", "pt")),
        (CheckpointError, lambda path: safe_open(path.parent, "pt")),
        (UsageError, lambda path: safe_open(path, "tf")),
        (UsageError, lambda path: safe_open(path, "pt", device="nope")),
        (UsageError, lambda path: safe_open(path, "pt", backend="other")),
        (MissingTensor, lambda path: safe_open(path, "pt").get_tensor("q")),
        (MissingTensor, lambda path: safe_open(path, "pt").get_slice("q")),
    ],
)
def test_what_safetensors_refuses_is_refused(
    error: type[Exception], call: Callable[[Path], object], path: Path
) -> None:
    with pytest.raises(error):
        call(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes([entry("a", "F32", (100_000,)), entry("b", "F32", (100_000,))]))
    with safe_open(path, "pt", backend=backend) as opened:
        with path.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(HeadraceError, match="became shorter"):
            opened.get_tensor("b")
        with pytest.raises(HeadraceError, match="became shorter"):
            opened.get_tensors()
