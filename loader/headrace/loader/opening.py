"""Opening a checkpoint: file by file its header, its plan, its read path, and what it must contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.cache.errors import CheckpointError, MissingTensor
from headrace.cache.safetensors import PREFIX, TensorInfo, header_length, parse_header
from headrace.loader.checkpoint import Checkpoint, name_list, read_bytes
from headrace.loader.choose import ReadPath, choose
from headrace.loader.memory import available
from headrace.loader.plan import FilePlan, Selection, plan_file
from headrace.loader.readers.reader import FileReader
from headrace.loader.source import Source, SourceFile
from headrace.loader.transfer import Transfer

DeviceReading = Callable[[SourceFile, FilePlan], FileReader]
"""Makes the reader for a file whose tensors go to a device."""


@dataclass(slots=True)
class Opening:
    """Opens the files of a checkpoint, one after another, and hands each to the transfer at once: the first
    is being read while the header of the last may not be staged yet.

    Attributes:
        files, readers: what was opened so far; the caller closes them.
        infos: the selected tensors.
        explain: one sentence for each file.
    """

    source: Source
    checkpoint: Checkpoint
    selection: Selection
    read_path: ReadPath
    transfer: Transfer
    max_image: int | None = None  # given when tensors are taken one by one
    for_device: DeviceReading | None = None
    files: list[SourceFile] = field(default_factory=list)
    readers: list[FileReader] = field(default_factory=list)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    explain: list[str] = field(default_factory=list)
    _home: dict[str, str] = field(default_factory=dict)  # tensor -> file

    def run(self) -> None:
        """Open everything.

        Raises:
            CheckpointError: a file that is not safetensors, or a tensor that two files have.
            MissingTensor: tensors that the index or the selection names are not there.
            LoadError: a file cannot be read or mapped.
            StagingStopped: a header is not here, and nobody stages it.
        """
        good = False
        try:
            paths = self._needed()
            with self.transfer.trace.span("open"):
                for path in paths:
                    self.files.append(self.source.open(path))
            total = sum(file.size for file in self.files)
            free = available()
            expected = self.checkpoint.expected()
            for file in self.files:
                self._open(file, expected.get(file.path, []), total, free)
            names = set(self._home)
            names.update(self.checkpoint.weight_map or ())
            self.selection.check(names, self.source.name)
            self.transfer.seal()
            if self.max_image is None:
                with self.transfer.trace.span("place"):  # while the threads read
                    for reader in self.readers:
                        reader.prepare()
            good = True
        finally:
            if not good:
                self.transfer.stop()

    def _needed(self) -> tuple[str, ...]:
        """Files that may have selected tensors: by the index if it knows all that was asked for."""
        weight_map = self.checkpoint.weight_map
        if self.selection.everything or weight_map is None:
            return self.checkpoint.files
        try:
            self.selection.check(weight_map, self.source.name)
        except MissingTensor:  # perhaps a tensor that is in a shard and not in the index
            return self.checkpoint.files
        chosen = {path for name, path in weight_map.items() if self.selection.takes(name)}
        return tuple(path for path in self.checkpoint.files if path in chosen)

    def _open(self, file: SourceFile, expected: list[str], total: int, free: int | None) -> None:
        trace = self.transfer.trace
        where = file.path
        self.transfer.require(file, 0, min(PREFIX, file.size))
        first = read_bytes(file, 0, min(PREFIX, file.size))
        length = header_length(first, file.size, where)
        self.transfer.require(file, PREFIX, PREFIX + length)
        with trace.span("header"):
            header = parse_header(read_bytes(file, PREFIX, PREFIX + length), file.size, where)
        missing = tuple(name for name in expected if name not in header.tensors)
        if missing:
            raise MissingTensor(
                f"{where} of {self.source.name} lacks {name_list(missing)}, which "
                f"{self.checkpoint.index} places there: stage or download it again",
                missing,
            )
        for name in header.tensors:
            if name in self._home:
                raise CheckpointError(
                    f"{self._home[name]} and {where} both have a tensor {name!r}: remove one"
                )
            self._home[name] = where
        with trace.span("plan"):
            plan = plan_file(file.path, header, self.selection, max_image=self.max_image)
            self.infos.update((placed.info.name, placed.info) for placed in plan.placed)
            reader = self._reader(file, plan, total, free)
        self.readers.append(reader)
        self.transfer.add(file, reader)

    def _reader(self, file: SourceFile, plan: FilePlan, total: int, free: int | None) -> FileReader:
        if self.for_device is not None:
            self.explain.append(f"{file.path}: through pinned buffers to the device")
            return self.for_device(file, plan)
        choice = choose(file, plan, self.read_path, total, free)
        self.explain.append(f"{file.path}: {choice.why}")
        return choice.reader(file, plan)
