"""A state dict whose tensors are read when an engine asks for them: `PendingTensor` by name.

An engine that takes a state dict gets names, dtypes and shapes at once, from the headers, and builds its
model while bytes are read. Two ways of reading stand behind it, so that memory never holds the model twice:

* `StreamedTensors`: everything is streamed in the background and each tensor handed over as it is. Right where
  the engine keeps tensors as they are stored.
* `SingleTensors`: each tensor is brought in when it is asked for, as a view of the mapped file. Right where the
  engine converts: what it converts from is page cache, not memory of this process.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.cache.errors import CheckpointError, LoadError, MissingTensor
from headrace.cache.safetensors import PREFIX, Header, TensorInfo, header_length, parse_header
from headrace.loader.api import stream
from headrace.loader.checkpoint import Checkpoint, name_list, read_bytes
from headrace.loader.dtypes import strict_torch_form
from headrace.loader.memory import anonymous, as_bytes, map_file, populate
from headrace.loader.readers.fetch import read_into
from headrace.loader.source import Source, SourceFile

_LARGE = 1 << 20


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of a checkpoint's files, checked against its index.

    Attributes:
        files: by path, in reading order.
        home: tensor name -> path.
    """

    files: Mapping[str, Header]
    home: Mapping[str, str]

    def infos(self) -> Iterator[TensorInfo]:
        """Every tensor: file by file, by name within each, as safetensors lists them."""
        for header in self.files.values():
            for name in sorted(header.tensors):
                yield header.tensors[name]


def read_headers(source: Source, checkpoint: Checkpoint) -> Headers:
    """Read every header, waiting for those that are still being staged.

    Raises:
        CheckpointError: a file that is not safetensors, or a tensor that two files have.
        MissingTensor: tensors that the index places in a file that lacks them; `names` has them.
        StagingStopped: a header is not here, and nobody stages it.
    """
    expected = checkpoint.expected()
    files: dict[str, Header] = {}
    home: dict[str, str] = {}
    for path in checkpoint.files:
        with contextlib.closing(source.open(path)) as file:
            length = header_length(read_bytes(file, 0, min(PREFIX, file.size)), file.size, path)
            header = parse_header(read_bytes(file, PREFIX, PREFIX + length), file.size, path)
        missing = tuple(name for name in expected.get(path, ()) if name not in header.tensors)
        if missing:
            raise MissingTensor(
                f"{path} of {source.name} lacks {name_list(missing)}, which {checkpoint.index} places there: "
                f"stage or download it again",
                missing,
            )
        for name in header.tensors:
            if name in home:
                raise CheckpointError(f"{home[name]} and {path} both have a tensor {name!r}: remove one")
            home[name] = path
        files[path] = header
    return Headers(files, home)


class Tensors(Protocol):
    """Where pending tensors come from.

    Attributes:
        failure: what reading failed with, if it has.
    """

    failure: BaseException | None

    def take(self, name: str, index: Any) -> torch.Tensor:
        """The part `index` of a tensor, once its bytes are there.

        Raises:
            HeadraceError: they cannot be had.
        """
        ...

    def close(self) -> None: ...


class PendingTensor:
    """What a state dict has in place of a tensor; `[...]` gives the tensor. Offers what safetensors' slices do,
    and what is asked of a tensor before its bytes are needed."""

    def __init__(self, info: TensorInfo, tensors: Tensors, where: str) -> None:
        self._info = info
        self._tensors = tensors
        self.dtype, shape = strict_torch_form(info, where)
        self.shape = torch.Size(shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensors.take(self._info.name, index)

    def get_shape(self) -> list[int]:
        """The shape as the header has it."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The format's dtype name, e.g. "BF16"."""
        return self._info.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()


def pending(headers: Headers, tensors: Tensors) -> dict[str, PendingTensor]:
    """The state dict.

    Raises:
        LoadError: a dtype that torch lacks.
    """
    return {info.name: PendingTensor(info, tensors, headers.home[info.name]) for info in headers.infos()}


class StreamedTensors:
    """All tensors of a source, streamed by a thread from the first `take` or `start` on; each is given once.

    Tensors on the host get storages of their own (which share memory with their neighbours), so that each can
    be saved alone.

    Args:
        options: for `stream`.
    """

    def __init__(self, source: Source, device: str | int | torch.device = "cpu", **options: Any) -> None:
        self.failure: BaseException | None = None
        self._source = source
        self._device = device
        self._options = options
        self._change = threading.Condition()
        self._arrived: dict[str, torch.Tensor] = {}
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="headrace-state-dict", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        with self._change:
            if self._thread.ident is None:
                self._thread.start()

    def take(self, name: str, index: Any) -> torch.Tensor:
        """See `Tensors`; a tensor that was taken is forgotten here, so that its memory is its taker's."""
        self.start()
        with self._change:
            while name not in self._arrived and not self._ended:
                self._change.wait()
            tensor = self._arrived.pop(name, None)
        if tensor is None:
            if self.failure is not None:
                raise self.failure
            raise LoadError(f"{self._source.name} gave no tensor {name!r}, or gave it before: load it again")
        return tensor[index]

    def close(self) -> None:
        """Stop reading and forget what was not taken."""
        with self._change:
            self._ended = True
            self._arrived.clear()
            self._change.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for name, tensor in stream(self._source, self._device, **self._options):
                with self._change:
                    if self._ended:
                        return  # the generator goes with this frame, and stops reading
                    self._arrived[name] = _own_storage(tensor)
                    self._change.notify_all()
        except BaseException as error:  # noqa: BLE001  (handed to the threads that wait, which raise it)
            self.failure = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()


class SingleTensors:
    """Tensors of a source, each brought in when it is asked for.

    Args:
        private: read into fresh memory, for tensors that must not depend on the file; else they are views of it.
    """

    def __init__(self, source: Source, headers: Headers, *, private: bool = False) -> None:
        self._private = private
        self.failure: BaseException | None = None
        self._headers = headers
        self._files: dict[str, SourceFile] = {}
        self._mappings: dict[str, mmap.mmap] = {}
        try:
            for path in headers.files:
                file = self._files[path] = source.open(path)
                self._mappings[path] = map_file(file.fileno(), file.size, path)
        except BaseException:
            self.close()
            raise

    def take(self, name: str, index: Any) -> torch.Tensor:
        """See `Tensors`. A part is a view; only its pages are read."""
        try:
            return self._whole(name, populated=index is Ellipsis)[index]
        except BaseException as error:
            self.failure = error
            raise

    def _whole(self, name: str, *, populated: bool) -> torch.Tensor:
        path = self._headers.home[name]
        header, file, mapping = self._headers.files[path], self._files[path], self._mappings[path]
        info = header.tensors[name]
        dtype, shape = strict_torch_form(info, path)
        if not info.nbytes:
            return torch.empty(shape, dtype=dtype)
        start = header.data_start + info.start
        if not file.ready(start, start + info.nbytes):
            file.wait(start, start + info.nbytes)
        if self._private:
            # Large pieces go back to the system when they are freed, which malloc's would not always.
            large = info.nbytes >= _LARGE
            own = anonymous(info.nbytes, path) if large else torch.empty(info.nbytes, dtype=torch.uint8)
            read_into(file, as_bytes(own), start)
            return own.view(dtype).view(shape)
        if populated:
            populate(torch.frombuffer(mapping, dtype=torch.uint8), start, start + info.nbytes, path)
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=start)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def close(self) -> None:
        """Close the files; tensors keep their memory for as long as they live."""
        self._mappings.clear()
        while self._files:
            self._files.popitem()[1].close()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own; tensors that are not on the host stay as they are."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return tensor
    raw = tensor.reshape(-1).view(torch.uint8)
    return torch.frombuffer(raw.numpy(), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
