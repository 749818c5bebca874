"""A model's weights for an engine: where they are, what is in them, and one checked pass over them.

An engine owns its parameters and copies each tensor into place as it gets it; what it is not given it does
not miss, and then answers wrongly. So all headers are compared with the checkpoint's index before the first
tensor is handed over, and the pass counts what it hands over.

A tensor that was handed over stays good for as long as somebody holds it: no buffer is used twice. Memory
is bounded because the pass pauses while `max_ahead` bytes wait, and an engine drops what it has copied.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.cache.errors import IntegrityError, Interrupted, LoadError, MissingTensor, UsageError
from headrace.loader.api import stream
from headrace.loader.checkpoint import find_checkpoint, name_list
from headrace.loader.choose import ReadPath
from headrace.loader.engines.options import EngineOptions
from headrace.loader.engines.pending import read_headers
from headrace.loader.engines.small_files import complete_folder
from headrace.loader.reference import is_stream_directory, open_source
from headrace.loader.source import DirectorySource, Source

_served: dict[str, set[str]] = {}  # reference -> models whose weights it stood for in this process


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine's weights are.

    Attributes:
        where: a path or a model reference, for `open_source`.
        plain: a directory (or file) that any loader can read as it is.
    """

    where: str
    plain: bool

    @classmethod
    def of(cls, model: str, revision: str | None, reference: str | None) -> Place:
        """From an engine's arguments.

        Args:
            model: the engine's model: a path, a model reference, or a repository of the Hugging Face hub.
            revision: of the repository, where it is one.
            reference: takes the place of the model, where given.
        """
        where = reference or model
        if os.path.exists(where):
            return cls(where, plain=not is_stream_directory(where))
        if "://" not in where and reference is None and where.count("/") == 1 and where[0] not in "./~":
            where = f"hf://{where}" + (f"@{revision}" if revision else "")
        return cls(where, plain=False)

    def open(self, options: EngineOptions) -> Source:
        """Open it, staging in the background where that is needed. Errors: those of `open_source`."""
        return open_source(self.where, root=options.root, domain=options.domain)


class Weights:
    """One pass over a model's tensors, for an engine to iterate over.

    Attributes:
        names: of the tensors handed over so far, as the checkpoint calls them.
        bytes: of these.
        seconds: that the last pass took, the engine's own work between two tensors included.
        failure: what this side failed with; None while it did not, whatever happened to the engine.
    """

    def __init__(
        self,
        place: Place,
        options: EngineOptions,
        *,
        shared: bool = False,
        skip: Callable[[str], bool] | None = None,
    ) -> None:
        """
        Args:
            place: where the weights are.
            options: of the plug-in.
            shared: other processes of this node read the same files at the same time.
            skip: tells by name which tensors the engine has no use for; they are not read.
        """
        self._place = place
        self._options = options
        self._read_path: ReadPath = options.read_path or ("buffered" if shared else "auto")
        self._skip = skip
        self.names: set[str] = set()
        self.bytes = 0
        self.seconds = 0.0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) on the host, each once. A new iteration starts from the beginning.

        Raises:
            HeadraceError: as `load`; kept in `failure`.
        """
        self.names, self.bytes, self.failure = set(), 0, None
        begin = time.perf_counter()
        tensors = self._tensors()
        try:
            while True:
                try:
                    # Engines iterate inside `with device`, which is not meant for what happens here.
                    with torch.device("cpu"):
                        name, tensor = next(tensors)
                except StopIteration:
                    break
                except BaseException as error:
                    self.failure = error
                    raise
                self.names.add(name)
                self.bytes += tensor.nbytes
                yield name, tensor
        finally:
            self.seconds = time.perf_counter() - begin
            tensors.close()

    def _tensors(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        options = self._options
        source = self._place.open(options)
        try:
            only = source.only if isinstance(source, DirectorySource) else None
            present = read_headers(source, find_checkpoint(source, only)).home
            wanted = set(present) if self._skip is None else {n for n in present if not self._skip(n)}
            if wanted:
                yield from stream(
                    source,
                    names=None if len(wanted) == len(present) else wanted,
                    read_path=self._read_path,
                    verify=options.verify,
                    threads=options.threads,
                    max_ahead=options.max_ahead,
                )
            lost = wanted - self.names
            if lost:
                raise LoadError(f"{source.name} gave no {name_list(sorted(lost))}: load it again")
        finally:
            source.close()


def reference_for(reference: str | None, model: str, *, serve: bool = False) -> str | None:
    """The reference that stands for an engine's model argument; None where the model stands for itself.

    Engines reload from another path by changing their model argument. The reference of the extra configuration
    is then still there, and must not be taken for the new model.

    Args:
        serve: the engine is loading its model, not reloading: the reference is what its user means.
    """
    if reference is None:
        return None
    if serve:
        _served.setdefault(reference, set()).add(model)
    return reference if model in _served.get(reference, {model}) else None


def staged(place: Place, options: EngineOptions) -> str:
    """A plain directory with the whole model, staged if need be, for an engine's own loader.

    Raises:
        HeadraceError: whatever staging raises.
    """
    if place.plain:
        folder = Path(place.where)
        return str(folder if folder.is_dir() else folder.parent)
    from headrace.cache.staging import stage
    from headrace.cache.stream_directory import read_record

    where, root, domain = place.where, options.root, options.domain
    if is_stream_directory(where):
        with contextlib.closing(place.open(options)) as source:
            complete = complete_folder(source)
        if complete is not None:
            return str(complete)
        record = read_record(where)
        where, root, domain = record.reference, root or record.root, domain or record.domain
    return stage(where, root=root, domain=domain).path


def check_whole(folder: str) -> set[str]:
    """All tensors of a plain directory.

    Raises:
        MissingTensor: its index names tensors that are not there; `names` has them.
        CheckpointError: its files are not usable.
    """
    source = DirectorySource(folder)
    return set(read_headers(source, find_checkpoint(source, source.only)).home)


def is_final(failure: BaseException) -> bool:
    """Whether another loader would not mend the failure, but hide it."""
    wrong = (UsageError, IntegrityError, MissingTensor, Interrupted)
    return isinstance(failure, wrong) or not isinstance(failure, Exception)


def ranks() -> int:
    """How many processes load this model together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return int(torch.distributed.get_world_size())
