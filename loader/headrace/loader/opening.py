"""Opening a checkpoint: file by file its header, its plan, its read path, and what it must contain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import xxhash

from headrace.cache.errors import CheckpointError, LoadError, MissingTensor
from headrace.cache.safetensors import (
    PREFIX,
    Header,
    TensorInfo,
    collector_paused,
    header_length,
    parse_header,
)
from headrace.loader import history
from headrace.loader.checkpoint import Checkpoint, name_list, read_bytes
from headrace.loader.choose import ReadPath, choose, choose_shared
from headrace.loader.gathering import plan_slices
from headrace.loader.memory import available, resident
from headrace.loader.pace import ENOUGH, Pace
from headrace.loader.plan import FilePlan, Selection, plan_file, plan_whole
from headrace.loader.ranks.agreement import facts_of
from headrace.loader.ranks.session import Intent, Session
from headrace.loader.readers.fetch import BufferedFetch, Fetch
from headrace.loader.readers.gather import GatherReader
from headrace.loader.readers.reader import FileReader
from headrace.loader.slices import SlicePlan
from headrace.loader.source import Source, SourceFile
from headrace.loader.transfer import Transfer
from headrace.loader.verify import FileCheck, VerifyMode, check_for

_HEAD = 64 * 1024  # bytes in which most headers fit

DeviceReading = Callable[[SourceFile, FilePlan, Fetch], FileReader]
"""Makes the reader for a file whose tensors go to a device."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file whose header is known. `digest` is of the header's text; `reader` where it is being read already."""

    file: SourceFile
    header: Header
    digest: str
    check: FileCheck | None
    reader: FileReader | None = None


@dataclass(slots=True)
class Opening:
    """Opens the files of a checkpoint, one after another, and hands each to the transfer at once: the first
    is being read while the header of the last may not be staged yet.

    Attributes:
        files, readers: what was opened so far, until `close`.
        infos: the selected tensors.
    """

    source: Source
    checkpoint: Checkpoint
    selection: Selection
    read_path: ReadPath
    transfer: Transfer
    max_image: int | None = None  # given when tensors are taken one by one
    for_device: DeviceReading | None = None
    threads: int = 2  # that read
    verify: VerifyMode = "auto"
    slices: SlicePlan | None = None
    session: Session | None = None  # given when ranks load together
    files: list[SourceFile] = field(default_factory=list)
    readers: list[FileReader] = field(default_factory=list)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    _why: list[str] = field(default_factory=list)  # of each reader
    _paces: dict[str, Pace] = field(default_factory=dict)  # device -> its rates
    _home: dict[str, str] = field(default_factory=dict)  # tensor -> file

    def run(self) -> None:
        """Open everything.

        Raises:
            CheckpointError: a file that is not safetensors, or a tensor that two files have.
            MissingTensor: tensors that the index or the selection names are not there.
            IntegrityError: a header does not have its digest.
            UsageError: a file is to be verified that has no digests.
            LoadError: a file cannot be read or mapped.
            StagingStopped: a header is not here, and nobody stages it.
        """
        good = False
        try:
            paths = self._needed()
            with self.transfer.trace.span("open"):
                for path in paths:
                    self.files.append(self.source.open(path))
                if len(paths) > 1:
                    self._ask_for_headers()
            # Where nothing is waited for. Thousands of objects may be made, all of which stay.
            at_once = self.session is None and all(file.complete for file in self.files)
            with collector_paused() if at_once else contextlib.nullcontext():
                self._open_all()
            good = True
        finally:
            if not good:
                self.transfer.stop()

    def _open_all(self) -> None:
        total = sum(file.size for file in self.files)
        free = available()
        expected = self.checkpoint.expected()
        opened: Iterable[_Opened] = (
            self._open(file, expected.get(file.path, []), total, free) for file in self.files
        )
        if self.session is not None:
            opened = list(opened)
            with self.transfer.trace.span("agree"):
                self._agree(self.session, opened)
        for one in opened:
            with collector_paused():
                self._start(one, total, free)
        if self.slices is not None or not self.selection.everything:
            names = {*self._home, *(self.checkpoint.weight_map or ())}
            self.selection.check(names, self.source.name)
            if self.slices is not None:
                self.slices.check(names, self.source.name)
        self.transfer.seal()
        if self.max_image is None:
            with self.transfer.trace.span("place"):  # while the threads read
                for reader in self.readers:
                    reader.prepare()

    def _ask_for_headers(self) -> None:
        """Have the kernel bring the beginnings of all files at once, before they are read one by one."""
        for file in self.files:
            if file.complete:
                with contextlib.suppress(OSError):  # advice
                    os.posix_fadvise(file.fileno(), 0, min(_HEAD, file.size), os.POSIX_FADV_WILLNEED)

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

    def _open(self, file: SourceFile, expected: list[str], total: int, free: int | None) -> _Opened:
        trace = self.transfer.trace
        where = file.path
        check = check_for(file, self.verify)
        read = read_bytes if check is None else check.read
        self.transfer.require(file, 0, min(PREFIX, file.size))
        first = read(file, 0, min(PREFIX, file.size))
        length = header_length(first, file.size, where)
        self.transfer.require(file, PREFIX, PREFIX + length)
        with trace.span("header"):
            text = read(file, PREFIX, PREFIX + length)
        reader = self._read_early(file, PREFIX + length, total, free) if check is None else None
        with trace.span("header"):
            header = parse_header(text, file.size, where)
        missing = tuple(name for name in expected if name not in header.tensors)
        if missing:
            raise MissingTensor(
                f"{where} of {self.source.name} lacks {name_list(missing)}, which "
                f"{self.checkpoint.index} places there: stage or download it again",
                missing,
            )
        if twice := self._home.keys() & header.tensors.keys():
            name = min(twice)
            raise CheckpointError(f"{self._home[name]} and {where} both have a tensor {name!r}: remove one")
        self._home.update(dict.fromkeys(header.tensors, where))
        return _Opened(file, header, xxhash.xxh3_64_hexdigest(text), check, reader)

    def _read_early(self, file: SourceFile, start: int, total: int, free: int | None) -> FileReader | None:
        """Let the threads read all of a file while its header is parsed, where that will be read in any case."""
        if not (self.selection.everything and file.complete and file.size > start):
            return None
        if self.slices or self.session or self.for_device or self.max_image is not None:
            return None
        with self.transfer.trace.span("plan"):
            plan = plan_whole(file.path, Header({}, None, start, file.size))
            reader = self._reader(file, plan, total, free)
        self.readers.append(reader)
        self.transfer.add(file, reader)
        return reader

    def _agree(self, session: Session, opened: list[_Opened]) -> None:
        """Let all ranks of the node make sure that they mean the same."""
        facts = facts_of(
            self.source,
            ((one.file, one.digest) for one in opened),
            {
                "the selection": self.selection.describe(),
                "the slices": "none" if self.slices is None else repr(replace(self.slices, rank=0)),
                "the read path": self.read_path,
                "the verifying": f"{self.verify}, of {sum(one.check is not None for one in opened)} files",
                "the kind of loading": "load" if self.max_image is None else "stream",
            },
        )
        parts = [resident(one.file.fileno(), 0, one.file.size) or 0.0 for one in opened]
        total = sum(one.file.size for one in opened)
        present = sum(part * one.file.size for part, one in zip(parts, opened, strict=True))
        intent = Intent(
            direct=self.read_path == "direct",
            complete=all(one.file.complete for one in opened),
            present=present / total if total else 1.0,
            whole_plan=self.slices is None and self.max_image is None,
            device=session.device,
        )
        session.agree(facts, intent)
        self.transfer.order = session.order

    def _start(self, opened: _Opened, total: int, free: int | None) -> None:
        """Hand a file over to the transfer."""
        file, header, check = opened.file, opened.header, opened.check
        with self.transfer.trace.span("plan"):
            if self.slices is not None:
                readers = self._slice_readers(self.slices, file, header, total, free)
            else:
                plan = plan_file(file.path, header, self.selection, max_image=self.max_image)
                if opened.reader is not None:
                    opened.reader.adopt(plan)
                    readers = []
                else:
                    readers = [self._reader(file, plan, total, free)]
                if self.selection.everything:
                    self.infos.update(header.tensors)
                else:
                    self.infos.update((info.name, info) for info in plan.infos)
        if check is not None:
            check.header = header
        for number, reader in enumerate(readers):
            reader.check = check if number == 0 or check is None else check.another()
            self.readers.append(reader)
            if self.session is not None:
                self.session.planned(file, reader)
            self.transfer.add(file, reader)

    def _slice_readers(
        self, slices: SlicePlan, file: SourceFile, header: Header, total: int, free: int | None
    ) -> list[FileReader]:
        """One for what is whole ranges of the file, one for what is gathered, as far as there are such."""
        ranges, gathered = plan_slices(file.path, header, self.selection, slices, max_image=self.max_image)
        infos = {info.name: info for plan in (ranges, gathered) for info in plan.infos}
        self.infos.update((name, infos[name]) for name in header.tensors if name in infos)
        readers: list[FileReader] = []
        if ranges.infos:
            readers.append(self._reader(file, ranges, total // slices.world, free))
        if gathered.infos:
            self._why.append(f"{len(gathered.infos)} slices gathered")
            if self.for_device is None:
                readers.append(GatherReader(file, gathered))
            else:
                readers.append(self.for_device(file, gathered, BufferedFetch(file)))
        return readers

    def _reader(self, file: SourceFile, plan: FilePlan, total: int, free: int | None) -> FileReader:
        def pace() -> Pace:
            return self._pace(file)

        mappable = self.for_device is None
        if self.session is not None and self.session.through_page_cache:
            choice = choose_shared(file, plan, self.read_path, mappable=mappable)
        else:
            mappable = mappable and (self.session is None or self.session.exchange is None)
            choice = choose(file, plan, self.read_path, pace=pace, total=total, free=free, mappable=mappable)
        self._why.append(choice.why)
        if choice.fetch is not None and self.session is not None:
            choice = replace(choice, fetch=self.session.fetch(file, choice.fetch))
        if self.for_device is not None:
            assert choice.fetch is not None  # not mappable
            return self.for_device(file, plan, choice.fetch)
        return choice.reader(file, plan)

    def _pace(self, file: SourceFile) -> Pace:
        """Of the file's device: one for all files that lie on it."""
        try:
            key = history.device_key(os.fstat(file.fileno()))
        except OSError as error:
            raise LoadError(f"{file.path} cannot be examined: {error.strerror or error}") from error
        if key not in self._paces:
            self._paces[key] = Pace(self.threads, history.recall(history.location(), key))
        return self._paces[key]

    @property
    def explain(self) -> list[str]:
        """One sentence for each file: its read path, why, and what was then found."""
        sentences = []
        for reader, why in zip(self.readers, self._why, strict=False):
            outcome = reader.outcome()
            if reader.check is not None:
                outcome += f"{'; ' if outcome else ''}verified, {reader.check.why}"
            sentences.append(f"{reader.file.path}: {reader.name}: {why}{'; ' if outcome else ''}{outcome}")
        if self.session is not None:
            sentences.append(self.session.why)
        return sentences

    def close(self) -> None:
        """Remember what was learned of the devices, and close what was opened."""
        for key, pace in self._paces.items():
            if pace.measured >= ENOUGH:
                history.remember(history.location(), key, pace.rates())
        for reader in self.readers:
            reader.close()
        for file in self.files:
            file.close()
