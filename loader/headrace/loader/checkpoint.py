"""Which files of a model make its checkpoint, and what its index promises.

The rules, in order:

1. A single file, or an index file, that the user named is what is loaded.
2. `model.safetensors.index.json` in the top folder; else the only `*.safetensors.index.json` there
   (diffusers calls it `diffusion_pytorch_model...`, Mistral `consolidated...`); several are refused.
3. Without an index all `*.safetensors` in the top folder, in name order; where there are others,
   `consolidated*.safetensors` (Mistral's second copy of the same weights) is left out.

With an index, exactly the shards it names are read: tensors that it does not list are loaded with the
shard they are in; tensors that it lists and the shard lacks are an error by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.cache.errors import CheckpointError, LoadError, MissingTensor, UnsafePath
from headrace.cache.paths import check_path
from headrace.loader.source import Source, SourceFile

INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
MAX_INDEX = 256 * 1024 * 1024
_PREFERRED_INDEX = "model" + INDEX_SUFFIX
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files that hold a model's tensors.

    Attributes:
        files: relative paths, in the order in which they are read.
        weight_map: tensor name -> file, from the index; None without an index.
        index: the index file's path, or None.
        left_out: safetensors files of the top folder that are not read.
    """

    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    index: str | None
    left_out: tuple[str, ...] = ()

    def expected(self) -> dict[str, list[str]]:
        """File -> the names that the index places in it; empty without an index."""
        result: dict[str, list[str]] = {}
        for name, file in (self.weight_map or {}).items():
            result.setdefault(file, []).append(name)
        return result


Read = Callable[[SourceFile, int, int], bytes]
"""Gives bytes [start, stop) of a file."""


def find_checkpoint(source: Source, only: str | None = None, read: Read | None = None) -> Checkpoint:
    """Find the files to load.

    Args:
        source: the model.
        only: a file of it that the user named: a .safetensors file or an index.
        read: reads the index; by default `read_bytes`.

    Raises:
        CheckpointError: there are none, or several and no way to choose, or the index is unusable.
        MissingTensor: shards that the index names are not there; `names` has their paths.
    """
    read = read or read_bytes
    if only is not None:
        return _from_index(source, only, source.paths(), read) if only.endswith(".json") else _alone(only)
    paths = source.paths()
    top = [path for path in paths if "/" not in path]
    indexes = [path for path in top if path.endswith(INDEX_SUFFIX)]
    if _PREFERRED_INDEX in indexes:
        return _from_index(source, _PREFERRED_INDEX, paths, read)
    if len(indexes) == 1:
        return _from_index(source, indexes[0], paths, read)
    if indexes:
        raise CheckpointError(
            f"{source.name} has several checkpoints ({', '.join(indexes)}): name the one to load"
        )
    weights = [path for path in top if path.endswith(SUFFIX)]
    if not weights:
        raise CheckpointError(f"{source.name} has no {SUFFIX} file in its top folder{_hint(paths)}")
    files = [path for path in weights if not path.startswith("consolidated")] or weights
    return Checkpoint(tuple(files), None, None, tuple(path for path in weights if path not in files))


def parse_index(text: bytes, where: str) -> dict[str, str]:
    """The weight map of an index file: tensor name -> shard, a relative path beside the index.

    Raises:
        CheckpointError: not such a file, or one that names a tensor twice or an unsafe path.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a usable index ({error}): download it again") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} is not an index: it has no weight_map; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{where} gives no file name for {name!r}: download it again")
    for file in set(weight_map.values()):
        try:
            check_path(file, where)
        except UnsafePath as error:
            raise CheckpointError(f"{where} is not usable: {error}") from error
        if not file.endswith(SUFFIX):
            raise CheckpointError(f"{where} names {file!r}, which is not a {SUFFIX} file")
    return weight_map


def read_bytes(file: SourceFile, start: int, stop: int) -> bytes:
    """Wait for [start, stop) of a file and read it.

    Raises:
        LoadError: the file cannot be read, or is shorter than it said.
        StagingStopped: the bytes are not here and nobody stages them.
    """
    if not file.ready(start, stop):
        file.wait(start, stop)
    result = b""
    while start + len(result) < stop:
        try:
            part = os.pread(file.fileno(), stop - start - len(result), start + len(result))
        except OSError as error:
            raise LoadError(f"{file.path} cannot be read: {error.strerror or error}") from error
        if not part:
            raise LoadError(f"{file.path} became shorter while it was read: stage or download it again")
        result = result + part if result else part  # all at once, as good as always
    return result


def _alone(path: str) -> Checkpoint:
    return Checkpoint((path,), None, None)


def _from_index(source: Source, index: str, paths: Iterable[str], read: Read) -> Checkpoint:
    where = f"{source.name}: {index}"
    file = source.open(index)
    try:
        if file.size > MAX_INDEX:
            raise CheckpointError(f"{where} is {file.size} bytes long, too long for an index")
        weight_map = parse_index(read(file, 0, file.size), where)
    finally:
        file.close()
    # Index paths are relative to the index, which may only lie in the top folder.
    files = tuple(dict.fromkeys(sorted(weight_map.values())))
    present = set(paths)
    missing = tuple(path for path in files if path not in present)
    if missing:
        raise MissingTensor(
            f"{source.name} lacks {name_list(missing)}, which {index} names: stage or download it again",
            missing,
        )
    left_out = (path for path in present if "/" not in path and path.endswith(SUFFIX) and path not in files)
    return Checkpoint(files, weight_map, index, tuple(sorted(left_out)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _hint(paths: Iterable[str]) -> str:
    paths = tuple(paths)
    folders = sorted({path.rsplit("/", 1)[0] for path in paths if path.endswith(SUFFIX)})
    if folders:
        return f": name one of its folders ({name_list(folders)})"
    others = sorted({ending for path in paths for ending in _OTHER_FORMATS if path.endswith(ending)})
    if others:
        return f", only {', '.join(others)} files: convert them to safetensors first"
    return ": check that this is a model's folder"


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    names = tuple(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
