"""Which files of a reference are staged: by default the weights in one format only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.snapshot import Selection

# The same weights in formats that are not needed where safetensors exist.
_OTHER_WEIGHTS = (
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.h5.index.json",
    "*.msgpack",
    "*.msgpack.index.json",
    "*.ot",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "*.mlmodel",
)
# No part of a model, whoever asks: neither staged nor published by default.
NEVER = (".git*", ".cache/*", "*/.cache/*", ".DS_Store", "._*", PUBLISHED_NAME)
# A reference to one of these alone is unpacked (see `archive`).
ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is not staged, and why."""

    path: str
    size: int
    why: str


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path, or its last name, fits one of the glob patterns ("dir/" means all below it)."""
    name = path.rpartition("/")[2]
    return any(
        fnmatchcase(path, p) or fnmatchcase(name, p) or (p.endswith("/") and path.startswith(p))
        for p in patterns
    )


def select(files: Sequence[tuple[str, int]], selection: Selection) -> tuple[list[str], list[Skipped]]:
    """Split (path, size) pairs into paths to stage and files to skip.

    Include patterns replace the defaults; ignore patterns come on top.
    """
    kept: list[str] = []
    skipped: list[Skipped] = []
    paths = {path for path, _ in files}
    safetensors = any(path.endswith(".safetensors") for path in paths)
    for path, size in files:
        why = _why_not(path, selection, safetensors, paths)
        if why is None:
            kept.append(path)
        elif path != PUBLISHED_NAME:
            skipped.append(Skipped(path, size, why))
    return kept, skipped


def outer(paths: Sequence[str], wanted: Selection) -> Selection:
    """The patterns that hold for a reference's own files: those for an archive mean its members."""
    own = [path for path in paths if path != PUBLISHED_NAME]
    return Selection() if len(own) == 1 and own[0].endswith(ARCHIVES) else wanted


def _why_not(path: str, selection: Selection, safetensors: bool, paths: set[str]) -> str | None:
    if path == PUBLISHED_NAME:
        return "it is the manifest"
    if matches(path, selection.ignore):
        return "an ignore pattern fits"
    if selection.include:
        return None if matches(path, selection.include) else "no include pattern fits"
    if matches(path, NEVER):
        return "it is no part of a model"
    if safetensors and matches(path, _OTHER_WEIGHTS):
        return "the weights are there as safetensors"
    folder, slash, name = path.rpartition("/")
    if fnmatchcase(name, "consolidated*.safetensors"):
        beside = {f"{folder}{slash}model.safetensors", f"{folder}{slash}model.safetensors.index.json"}
        if beside & paths:
            return "the same weights are there as model*.safetensors"
    return None
