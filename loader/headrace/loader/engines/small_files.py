"""What engines read as ordinary files: configuration, tokenizer, chat template, code. Everything but weights.

A complete model is a folder already. Of one that is still being staged, the small files are waited for and
copied to a temporary folder, while the weights keep arriving.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from headrace.cache.errors import LoadError
from headrace.loader.checkpoint import SUFFIX, read_bytes
from headrace.loader.source import Source

MOST = 256 * 1024 * 1024
"""Bytes of the largest file that counts as small: tokenizers have tens of megabytes."""

_WEIGHTS = (SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")


def complete_folder(source: Source) -> Path | None:
    """The folder in which every file of the model is complete; None while it is being staged."""
    folder = getattr(source, "folder", None)
    return None if folder is None else Path(folder)


def can_be_whole(source: Source) -> bool:
    """Whether there is, or will be, a folder with every file."""
    return complete_folder(source) is not None or getattr(source, "job", None) is not None


def whole_folder(source: Source) -> Path:
    """As `complete_folder`, but wait until everything is staged.

    Raises:
        HeadraceError: staging failed.
        LoadError: there is no such folder, and nothing here that makes one.
    """
    folder = complete_folder(source)
    if folder is not None:
        return folder
    job = getattr(source, "job", None)
    if job is None:
        raise LoadError(f"{source.name} is no complete folder: stage it first")
    return Path(job.wait().path)


@contextlib.contextmanager
def small_files(source: Source) -> Iterator[Path]:
    """A folder with all small files under their names; the model's own folder where that is complete.

    Raises:
        StagingStopped: a file is not here, and nobody stages it.
        LoadError: a file cannot be read.
    """
    folder = complete_folder(source)
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="headrace-") as temporary:
        for path in source.paths():
            if not path.endswith(_WEIGHTS):
                _copy(source, path, Path(temporary, path))
        yield Path(temporary)


def _copy(source: Source, path: str, target: Path) -> None:
    with contextlib.closing(source.open(path)) as file:
        if file.size > MOST:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(file, 0, file.size))
