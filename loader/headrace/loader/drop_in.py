"""`safe_open` and `load_file` with the signatures and results of safetensors 0.8.0, for torch.

What differs: files are checked more strictly (see `headrace.cache.safetensors`), errors are headrace's (a
file that does not exist stays FileNotFoundError), and the pages of a mapped tensor are brought in when it is
asked for, so that a truncated file is an error and not the end of the process.

As with safetensors, each tensor has a storage of its own; with the "mmap" backend it is the file's memory,
privately mapped, with "pread" a fresh copy.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from headrace.cache.errors import LoadError, MissingTensor, UsageError
from headrace.cache.safetensors import Header, TensorInfo, read_header
from headrace.loader.dtypes import strict_torch_form
from headrace.loader.memory import as_bytes, map_file, populate
from headrace.loader.readers.fetch import read_into
from headrace.loader.source import LocalFile

_TORCH_NAMES = ("pt", "torch", "pytorch")
_BACKENDS = ("mmap", "pread")
_POPULATE = 64 * 1024 * 1024


class safe_open:  # safetensors' own name
    """Open a safetensors file lazily; also a context manager.

    Args:
        filename: the file.
        framework: "pt" (or "torch", "pytorch"); the others are safetensors' own business.
        device: where tensors are to be: a text, a CUDA device's number, or a torch.device.
        backend: "mmap" or "pread".

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a good safetensors file.
        UsageError: an argument that cannot be meant.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        if framework not in _TORCH_NAMES:
            raise UsageError(
                f"framework {framework!r} is not supported here: use 'pt', or safetensors itself"
            )
        if backend not in _BACKENDS:
            raise UsageError(f"backend {backend!r} is not one of {', '.join(_BACKENDS)}")
        self._device = _parse_device(device)
        if not os.path.exists(filename):
            raise FileNotFoundError(f"No such file or directory: {os.fspath(filename)}")
        self._name = os.fspath(filename)
        self._file: LocalFile | None = LocalFile(Path(filename), self._name)
        self._mapping: mmap.mmap | None = None
        try:
            self._header: Header = read_header(self._file.fileno(), self._name)
            if backend == "mmap":
                self._mapping = map_file(self._file.fileno(), self._file.size, self._name)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> safe_open:
        self._open_file()
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        self._mapping = None  # tensors keep the memory for as long as they live

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        self._open_file()
        return sorted(self._header.tensors)

    def offset_keys(self) -> list[str]:
        """Names of the tensors in the order of their bytes."""
        self._open_file()
        return list(self._header.tensors)

    def metadata(self) -> dict[str, str] | None:
        """The header's free-form texts, or None."""
        self._open_file()
        return None if self._header.metadata is None else dict(self._header.metadata)

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            MissingTensor: the file has none of this name.
            LoadError: torch cannot express it, or its bytes cannot be read.
        """
        info = self._info(name)
        if self._mapping is not None and info.nbytes:
            start = self._header.data_start + info.start
            populate(_whole(self._mapping), start, start + info.nbytes, self._name)
        return self._tensor(info).to(self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in the order of their bytes; read by several threads."""
        file = self._open_file()
        infos = list(self._header.tensors.values())
        for info in infos:
            strict_torch_form(info, self._name)  # before anything is read
        threads = max(2, min(8, len(os.sched_getaffinity(0))))
        with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="headrace-load") as pool:
            if self._mapping is not None:
                memory = _whole(self._mapping)
                size = file.size
                starts = range(0, size, _POPULATE)
                list(pool.map(lambda at: populate(memory, at, min(at + _POPULATE, size), self._name), starts))
                tensors = [self._tensor(info) for info in infos]
            else:
                tensors = list(pool.map(self._tensor, infos))
        return {info.name: tensor.to(self._device) for info, tensor in zip(infos, tensors, strict=True)}

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor to take parts of: only the pages that a part touches are read.

        Raises:
            MissingTensor: the file has none of this name.
        """
        return TensorSlice(self, self._info(name))

    def _open_file(self) -> LocalFile:
        if self._file is None:
            raise LoadError(f"{self._name} is closed: open it again")
        return self._file

    def _info(self, name: str) -> TensorInfo:
        self._open_file()
        info = self._header.tensors.get(name)
        if info is None:
            raise MissingTensor(f"{self._name} has no tensor {name!r}: check the name", (name,))
        return info

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        file = self._open_file()
        dtype, shape = strict_torch_form(info, self._name)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        start = self._header.data_start + info.start
        if self._mapping is None:
            raw = torch.empty(info.nbytes, dtype=torch.uint8)
            read_into(file, as_bytes(raw), start)
        else:
            raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=info.nbytes, offset=start)
            if raw.data_ptr() % dtype.itemsize:
                # Read, not copied: touching the mapping of a file that became shorter would kill the process.
                raw = torch.empty(info.nbytes, dtype=torch.uint8)
                read_into(file, as_bytes(raw), start)
        return raw.view(dtype).view(shape)


class TensorSlice:
    """What `safe_open.get_slice` returns: index it as a torch tensor to read a part."""

    def __init__(self, opened: safe_open, info: TensorInfo) -> None:
        self._opened = opened
        self._info = info

    def get_shape(self) -> list[int]:
        """The shape as the header has it."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The format's dtype name, e.g. "BF16"."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._opened._tensor(self._info)[index].to(self._opened._device)


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of one file, by name, in the order of their bytes; see `safe_open`."""
    with safe_open(filename, framework="pt", device=device, backend=backend) as file:
        return file.get_tensors()


def _parse_device(device: str | int | torch.device) -> torch.device:
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is invalid: use cpu or cuda:N") from error


def _whole(mapping: mmap.mmap) -> torch.Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8)
