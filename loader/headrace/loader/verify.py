"""Verifying while loading: the bytes are compared with their chunks' digests in the pass that reads them.

A chunk's bytes are hashed in file order, each part right after it was read, while it is still in the CPU's
cache. So one thread reads a chunk from its first to its last byte: `FileCheck.runs` cuts the plan's blocks into
runs that begin and end with chunks. Readers fill whole pages, and chunks end anywhere: the page in which one run
ends and the next begins is read by the next alone, which hands the bytes before its own chunks to the run before
it (a *fragment*); whichever of both threads comes second ends the chunk.

Slices are gathered from many places of a chunk. There the chunk is read and compared first, and the slice then
taken from the page cache.

What a selection leaves out of a chunk is read too, in small pieces that are dropped again, because only a whole
chunk can be compared: at most two chunks for each gap of a selection.

A tensor counts as loaded only when all its chunks were found right.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from headrace.cache.errors import IntegrityError, StoreError, UsageError
from headrace.cache.safetensors import Header
from headrace.loader.checkpoint import name_list, read_bytes
from headrace.loader.plan import BLOCK, PAGE, Block, FilePlan
from headrace.loader.source import SourceFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from headrace.cache.digest import Hasher
    from headrace.cache.grid import Grid
    from headrace.loader.readers.reader import FileReader

VerifyMode = Literal["auto", "always", "boot", "never"]
"""Which files are verified: all; those not yet verified on this boot of the machine; none. "auto": those that
their store has no note of ever having been verified as a whole."""

Fragment = list[tuple[int, bytes]]
"""The last bytes of a run, less than a page: (where they begin in the file, bytes)."""

_SMALL = 1024 * 1024  # a run is not so short, if another chunk follows
_PIECE = 1024 * 1024  # of what is read only to be hashed


@runtime_checkable
class Digested(Protocol):
    """A `SourceFile` whose chunks' digests are known to its store."""

    @property
    def grid(self) -> Grid: ...

    def has_digests(self) -> bool:
        """Whether this process may read them."""
        ...

    def hasher(self) -> Hasher:
        """For one chunk: `update` with its bytes, then `digest`."""
        ...

    def digest(self, index: int) -> bytes | None:
        """Of a chunk that is ready; None where unknown. Called by several threads, after `has_digests`."""
        ...

    def verified(self) -> Literal["this boot", "earlier boot", "never", "unknown"]:
        """When the whole file was last verified."""
        ...

    def note_verified(self, *, good: bool) -> None:
        """Take a note, where this process may: the whole file was found right, or a chunk wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Run(Block):
    """Blocks that one thread reads in order, because they share chunks.

    Attributes:
        start, stop: the bytes that are not verified before the run was read: its own, and those of a chunk that
            it shares with a neighbour.
        parts: the blocks, in file order.
        chunks: the chunks that are compared with their digests, in order.
        number: of the run in its file.
        gives: it begins with the last bytes of the run before, which waits for them.
        waits: the last bytes of its last chunk come with the run after.
    """

    parts: tuple[Block, ...]
    chunks: tuple[int, ...]
    number: int
    gives: bool = False
    waits: bool = False


def check_verify(mode: str) -> None:
    """Raises: UsageError: no such mode."""
    if mode not in get_args(VerifyMode):
        raise UsageError(f"verify must be one of {', '.join(get_args(VerifyMode))}, not {mode!r}")


def check_for(file: SourceFile, mode: VerifyMode) -> FileCheck | None:
    """The check of one file, or None where it is not to be verified.

    Raises:
        UsageError: it is to be verified, and there is nothing to compare it with.
    """
    if mode == "never":
        return None
    if not isinstance(file, Digested):
        if mode == "auto":
            return None
        raise UsageError(
            f"{file.path} cannot be verified, because a plain folder or file has no digests: stage it (a folder "
            "here with `headrace import`), or load it with verify='never'"
        )
    last = file.verified()
    if (mode == "auto" and last != "never") or (mode == "boot" and last == "this boot"):
        return None
    if not file.has_digests():
        if mode == "auto":
            return None
        raise UsageError(
            f"{file.path} cannot be verified by this user: its digests were learned, not published, and the store "
            "shows them to its owner alone; load as that user, or with verify='never'"
        )
    why = {
        "always": "as asked",
        "boot": "because it was not since the machine started",
        "auto": "because its store has no note that it ever was",
    }[mode]
    return FileCheck(file, file, why)


def reading(mode: VerifyMode) -> Callable[[SourceFile, int, int], bytes]:
    """Like `checkpoint.read_bytes`, verifying each file that is to be verified; raises what `FileCheck` raises."""

    def read(file: SourceFile, start: int, stop: int) -> bytes:
        check = check_for(file, mode)
        return read_bytes(file, start, stop) if check is None else check.read(file, start, stop)

    return read


class _Cursor:
    """How far the chunks of one run have been hashed. Not for several threads at once."""

    def __init__(self, check: FileCheck, chunks: Sequence[int]) -> None:
        self._check = check
        self._chunks = iter(chunks)
        self._state: Hasher | None = None
        self._next_chunk()

    def _next_chunk(self) -> None:
        self._index = next(self._chunks, -1)
        if self._index < 0:
            return
        self._at, self._stop = self._check.grid.span(self._index, self._index + 1)
        self._state = self._check.hasher()

    def take(self, start: int, memory: memoryview) -> None:
        """Bytes from `start` on; those that come again, or belong to no chunk of the run, are passed over."""
        stop = start + len(memory)
        while self._index >= 0 and stop > self._at:
            if start >= self._stop:
                self._read(self._stop)
                continue
            if start > self._at:
                self._read(start)
            end = min(stop, self._stop)
            self._hash(memory[self._at - start : end - start])

    def end(self, fragment: Fragment) -> None:
        """Take the last bytes, and read what nobody else wanted of the chunks."""
        for start, memory in fragment:
            self.take(start, memoryview(memory))
        while self._index >= 0:
            self._read(self._stop)

    def _read(self, stop: int) -> None:
        index = self._index
        while self._index == index and self._at < stop:
            end = min(self._at + _PIECE, stop)
            self._hash(memoryview(read_bytes(self._check.file, self._at, end)))

    def _hash(self, memory: memoryview) -> None:
        assert self._state is not None
        self._state.update(memory)
        self._at += len(memory)
        if self._at == self._stop:
            self._check.compare(self._index, self._state.digest())
            self._next_chunk()


@dataclass(slots=True)
class _Filling:
    """What a thread is reading: `before`, its first bytes, as far as they belong to the run before."""

    run: Run
    cursor: _Cursor
    before: Fragment = field(default_factory=list)
    shown: int = 0


@dataclass(slots=True)
class _Ends:
    """Runs that wait for their fragment, and fragments that came before their run was read; by run number."""

    waiting: dict[int, _Cursor] = field(default_factory=dict)
    fragments: dict[int, Fragment] = field(default_factory=dict)


class FileCheck:
    """Verifies what one reader reads of a file.

    Attributes:
        why: part of a sentence.
        header: of the file, once it is known: for messages.
    """

    def __init__(self, file: SourceFile, digests: Digested, why: str) -> None:
        self.file = file
        self.grid = digests.grid
        self.hasher = digests.hasher
        self.why = why
        self.header: Header | None = None
        self._digests = digests
        self._lock = threading.Lock()
        self._right: set[int] = set()  # chunks
        self._ends = _Ends()
        self._turns: dict[int, threading.Lock] = {}  # of chunks that are read ahead
        self._thread = threading.local()

    def another(self) -> FileCheck:
        """Of the same file, for another reader."""
        other = FileCheck(self.file, self._digests, self.why)
        other.header = self.header
        return other

    @property
    def verified_bytes(self) -> int:
        """Bytes of the chunks that were found right."""
        return sum(self.grid.lengths[index] for index in self._right)

    # -- planning ---------------------------------------------------------------------------------------

    def runs(self, plan: FilePlan, granularity: int) -> list[Run]:
        """The plan's blocks, cut and grouped so that each run reads whole chunks."""
        groups = list(self._groups(plan.wanted()))
        # Where each run begins: with the page in which its first chunk does.
        cuts = [self.grid.offsets[chunks[0]] // PAGE * PAGE for chunks in groups]
        pieces: list[list[Block]] = [[] for _ in groups]
        for block in plan.blocks(granularity):
            start = block.start
            while start < block.stop:
                number = max(0, bisect_right(cuts, start) - 1)
                stop = min([block.stop, *cuts[number + 1 : number + 2]])
                pieces[number].append(replace(block, start=start, stop=stop))
                start = stop
        runs: list[Run] = []
        early: tuple[int, ...] = ()
        for chunks, parts in zip(groups, pieces, strict=True):
            own = early + chunks
            if not parts:  # all that is needed of them lies in the page where the next run begins
                early = own
                continue
            early = ()
            start = parts[0].start
            gives = bool(runs) and runs[-1].chunks[-1] + 1 == own[0] and start < self.grid.offsets[own[0]]
            if gives:
                runs[-1] = replace(runs[-1], stop=self.grid.offsets[own[0]], waits=True)
                start = self.grid.offsets[self.grid.covering(start, start + 1)[0]]
            joined = tuple(_resized(parts))
            stop = max(part.stop for part in joined)
            runs.append(Run(start, stop, parts[0].segment, joined, own, len(runs), gives))
        return runs

    def _groups(self, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
        """The chunks that these bytes touch, in groups for one run each."""
        needed: list[int] = []
        for start, stop in wanted:
            first, last = self.grid.covering(start, stop)
            needed += range(max(first, needed[-1] + 1) if needed else first, last)
        group: list[int] = []
        size = 0
        for place, index in enumerate(needed):
            group.append(index)
            size += self.grid.lengths[index]
            if place + 1 == len(needed):
                yield tuple(group)
            elif size >= _SMALL and size + self.grid.lengths[needed[place + 1]] > BLOCK:
                yield tuple(group)
                group, size = [], 0

    # -- reading ----------------------------------------------------------------------------------------

    def read(self, file: SourceFile, start: int, stop: int) -> bytes:
        """Bytes of a header, out of chunks that were found right; instead of `checkpoint.read_bytes`.

        Raises:
            IntegrityError: a chunk is wrong.
            LoadError: the bytes cannot be read.
        """
        first, last = self.grid.covering(start, stop)
        begin, end = self.grid.span(first, last)
        cursor = _Cursor(self, range(first, last))
        result = bytearray()
        for at in range(begin, end, _PIECE):
            piece = read_bytes(file, at, min(at + _PIECE, end))
            cursor.take(at, memoryview(piece))
            result += piece[max(0, start - at) : max(0, stop - at)]
        return bytes(result)

    def fill(self, reader: FileReader, run: Run) -> None:
        """Let a reader fill all blocks of a run, and compare its chunks.

        Raises:
            IntegrityError: a chunk is wrong.
            LoadError: the bytes cannot be read.
        """
        filling = self._thread.filling = _Filling(run, _Cursor(self, run.chunks))
        try:
            for part in run.parts:
                filling.shown = part.start
                reader.fill(part)
                if filling.shown < part.stop:
                    raise AssertionError(f"{reader.name} does not show what it reads")
        finally:
            del self._thread.filling
        if run.gives:
            with self._lock:
                waiting = self._ends.waiting.pop(run.number - 1, None)
                if waiting is None:
                    self._ends.fragments[run.number - 1] = filling.before
            if waiting is not None:
                waiting.end(filling.before)
        fragment: Fragment | None = []
        if run.waits:
            with self._lock:
                fragment = self._ends.fragments.pop(run.number, None)
                if fragment is None:
                    self._ends.waiting[run.number] = filling.cursor
        if fragment is not None:
            filling.cursor.end(fragment)

    def read_ahead(self, block: Block) -> None:
        """Read and compare the chunks that a block touches, each once, before a reader that shows nothing takes
        the block: from the page cache, which then has them.

        Raises:
            IntegrityError: a chunk is wrong.
            LoadError: the bytes cannot be read.
        """
        for index in range(*self.grid.covering(block.start, block.stop)):
            with self._lock:
                turn = self._turns.setdefault(index, threading.Lock())
            with turn:
                if index not in self._right:
                    _Cursor(self, (index,)).end([])

    def arrived(self, start: int, memory: Buffer) -> None:
        """Bytes of the file from `start` on are in memory, from where they will be used.

        Called by `FileReader.fill`, in its own thread, in file order, for every byte of the block.
        """
        filling: _Filling = self._thread.filling
        view = memoryview(memory)
        own = self.grid.offsets[filling.run.chunks[0]]
        if filling.run.gives and start < own:
            filling.before.append((start, bytes(view[: own - start])))
        filling.cursor.take(start, view)
        filling.shown = start + len(view)

    # -- comparing --------------------------------------------------------------------------------------

    def compare(self, index: int, digest: bytes) -> None:
        """Compare a chunk with its digest.

        Raises:
            IntegrityError: it is wrong.
            StoreError: its digest is unknown.
        """
        expected = self._digests.digest(index)
        if expected is None:
            raise StoreError(
                f"the store has lost the digest of chunk {index} of {self.file.path}: run "
                "`headrace verify --repair`, or load with verify='never'"
            )
        if digest != expected:
            self._digests.note_verified(good=False)
            raise IntegrityError(self._sentence(index))
        with self._lock:
            self._right.add(index)
            whole = len(self._right) == len(self.grid)
        if whole:
            self._digests.note_verified(good=True)

    def _sentence(self, index: int) -> str:
        start, stop = self.grid.span(index, index + 1)
        return (
            f"chunk {index} of {self.file.path}, bytes {start} to {stop}{self._contents(start, stop)}, does not have "
            "its digest: run `headrace verify --repair`"
        )

    def _contents(self, start: int, stop: int) -> str:
        if self.header is None:
            return ""
        base = self.header.data_start
        names = [
            info.name
            for info in self.header.tensors.values()
            if base + info.start < stop and base + info.stop > start and info.start < info.stop
        ]
        return f", with {name_list(names)}" if names else ""


def _resized(parts: Sequence[Block]) -> Iterator[Block]:
    """The same bytes in blocks as long as possible: neighbours are joined, and cut evenly at pages."""
    joined: list[Block] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.segment == part.segment and last.stop == part.start:
            joined[-1] = replace(last, stop=part.stop)
        else:
            joined.append(part)
    for block in joined:
        # A block that begins or ends within a page must not be longer than BLOCK with all of its pages.
        pages = -(-block.stop // PAGE) - block.start // PAGE
        count = -(-pages * PAGE // BLOCK)
        start = block.start
        for number in range(1, count + 1):
            cut = block.start // PAGE * PAGE + pages * number // count * PAGE
            stop = block.stop if number == count else cut
            yield replace(block, start=start, stop=stop)
            start = stop
