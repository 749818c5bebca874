"""Runs reads: which block is next, who waits for what, and which tensors are complete.

Threads take blocks in plan order, but a block whose bytes are not staged yet is passed over for one whose
bytes are: loading keeps up with staging in whatever order chunks arrive. Threads that find nothing ready
wait for the first blocks of the plan, which asks the stager to bring those first, and look again a few
dozen times a second.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headrace.cache.errors import LoadError
from headrace.loader.plan import Block
from headrace.loader.readers.reader import FileReader
from headrace.loader.source import SourceFile
from headrace.loader.trace import Trace

POLL = 0.02
"""Seconds between two looks for blocks that became ready."""

_SCAN = 256  # blocks that one look asks about, at the front and from a cursor that wanders through the rest


DEFAULT_THREADS = 8
"""How many threads read, at most. Waiting for a disk takes no core, and four requests at a time do not keep every disk
busy; where nothing is waited for, fewer are of use (`FileReader.threads`)."""


@dataclass(slots=True, eq=False)
class Job:
    """The reading of one file, from `open` to its last block."""

    file: SourceFile
    reader: FileReader
    pending: list[Block]
    unfinished: int
    tensors_of: dict[Block, list[int]]  # block -> tensors that it brings bytes of
    blocks_left: list[int]  # per tensor
    before: tuple[int, int] | None  # size and time of change, of a file that was complete
    cursor: int = 0

    @classmethod
    def of(cls, file: SourceFile, reader: FileReader, *, per_tensor: bool) -> Job:
        """Plan the blocks; `per_tensor` keeps track of when each tensor is complete."""
        blocks = reader.blocks()
        left = [0] * len(reader.plan.infos)
        tensors_of: dict[Block, list[int]] = {}
        if per_tensor:
            for number, block in reader.plan.brought_by(blocks):
                tensors_of.setdefault(block, []).append(number)
                left[number] += 1
        before = _identity(file) if file.complete else None
        return cls(file, reader, blocks, len(blocks), tensors_of, left, before)

    def check_unchanged(self) -> None:
        """Raises: LoadError: the file is not the one that loading began with."""
        if self.before is not None and _identity(self.file) != self.before:
            raise LoadError(f"{self.file.path} changed while it was loaded: load it again")


@dataclass(slots=True)
class Ready:
    """A tensor whose bytes are all there: `job.reader.plan.infos[number]`."""

    job: Job
    number: int


@dataclass(slots=True)
class _State:
    jobs: list[Job] = field(default_factory=list)  # those with pending blocks
    completed: deque[Ready] = field(default_factory=deque)
    in_flight: int = 0
    ahead: int = 0  # bytes of the tensors in `completed`
    waiting: int = 0
    sealed: bool = False
    stopped: bool = False


class Transfer:
    """Shared by the thread that opens files, the threads that read, and whoever takes tensors.

    Args:
        trace: gets what the threads did.
        per_tensor: make tensors known one by one (`taken`), not only the end.
        max_ahead: with `per_tensor`, threads pause while tensors of this many bytes are complete and not taken.
    """

    def __init__(self, trace: Trace, *, per_tensor: bool = False, max_ahead: int | None = None) -> None:
        self.trace = trace
        self.order: Callable[[list[Block], int], list[Block]] | None = None
        """The order in which the blocks of a file of so many bytes are read, where it is not the file's."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called whenever this is stopped: for whoever a reading thread may wait for."""
        self.reinforce: Callable[[int | None], None] = lambda _threads: None
        """Called when there is something to read: so many threads are of use; None: any number."""
        self._per_tensor = per_tensor
        self._max_ahead = max_ahead
        self._state = _State()
        self._change = threading.Condition()

    # -- the thread that opens files ------------------------------------------------------------------

    def require(self, file: SourceFile, start: int, stop: int) -> None:
        """Return when [start, stop) is ready.

        Raises:
            StagingStopped: it never will be.
            LoadError: loading failed elsewhere meanwhile.
        """
        if file.ready(start, stop):
            return
        with self.trace.span("wait"):
            while not file.ready(start, stop):
                if self._state.stopped:
                    raise LoadError(f"{file.path} was not opened, because loading failed before")
                file.wait(start, stop, timeout=POLL * 5)

    def add(self, file: SourceFile, reader: FileReader) -> None:
        """Let the threads read another file."""
        job = Job.of(file, reader, per_tensor=self._per_tensor)
        if self.order is not None:
            job.pending = self.order(job.pending, file.size)
        with self._change:
            if job.pending:
                self._state.jobs.append(job)
            if self._per_tensor:
                for number, left in enumerate(job.blocks_left):
                    if not left:
                        self._state.completed.append(Ready(job, number))
            self._change.notify_all()
        if job.pending:
            self.reinforce(reader.threads)

    def seal(self) -> None:
        """No file will be added any more."""
        with self._change:
            self._state.sealed = True
            self._change.notify_all()

    def stop(self) -> None:
        """Make every thread return soon, whatever is left to do."""
        with self._change:
            self._state.stopped = True
            self._change.notify_all()
        self.on_stop()

    # -- the threads that read ------------------------------------------------------------------------

    def work(self) -> None:
        """Read blocks until none is left. A failure stops the other threads too.

        Raises:
            LoadError: bytes cannot be read, or a file changed meanwhile.
            StagingStopped: bytes are missing and nobody stages them.
        """
        good = False
        try:
            while (found := self._next()) is not None:
                job, block = found
                with self.trace.span(job.reader.span):
                    job.reader.read(block)
                self._filled(job, block)
            good = True
        finally:
            if not good:
                self.stop()

    def _next(self) -> tuple[Job, Block] | None:
        state = self._state
        while True:
            with self._change:
                if state.stopped or (state.sealed and not state.jobs):
                    return None
                if self._must_pause():
                    self._change.wait()
                    continue
                found = self._pick()
                if found is not None:
                    state.in_flight += 1
                    return found
                if not state.jobs:
                    self._change.wait()
                    continue
                # Each waiting thread asks for another block, the first ones of the plan.
                job = state.jobs[0]
                block = job.pending[min(state.waiting, len(job.pending) - 1)]
                state.waiting += 1
            try:
                with self.trace.span("wait"):
                    job.file.wait(block.start, block.stop, timeout=POLL)
            finally:
                with self._change:
                    state.waiting -= 1

    def _must_pause(self) -> bool:
        if self._max_ahead is None or not self._state.completed:
            return False
        return self._state.ahead >= self._max_ahead

    def _pick(self) -> tuple[Job, Block] | None:
        """The first block that is ready; takes it off the list."""
        for place, job in enumerate(self._state.jobs):
            index = self._first_ready(job)
            if index is None:
                continue
            block = job.pending.pop(index)
            if not job.pending:
                del self._state.jobs[place]
                if not self._state.jobs and self._state.sealed:
                    self._change.notify_all()
            return job, block
        return None

    @staticmethod
    def _first_ready(job: Job) -> int | None:
        pending = job.pending
        if job.file.complete:
            return 0
        for index in range(min(_SCAN, len(pending))):
            if job.file.ready(pending[index].start, pending[index].stop):
                return index
        rest = len(pending) - _SCAN
        for step in range(min(_SCAN, rest)):
            index = _SCAN + (job.cursor + step) % rest
            if job.file.ready(pending[index].start, pending[index].stop):
                job.cursor = index - _SCAN
                return index
        job.cursor += _SCAN
        return None

    def _filled(self, job: Job, block: Block) -> None:
        with self._change:
            state = self._state
            state.in_flight -= 1
            job.unfinished -= 1
            last = not job.unfinished
            if self._per_tensor:
                for number in job.tensors_of.pop(block, ()):
                    job.blocks_left[number] -= 1
                    if not job.blocks_left[number]:
                        state.completed.append(Ready(job, number))
                        state.ahead += job.reader.plan.infos[number].nbytes
                self._change.notify_all()
        if last:
            job.check_unchanged()

    # -- whoever takes tensors ------------------------------------------------------------------------

    def taken(self) -> Iterator[Ready]:
        """Tensors as they complete; ends when all were given, or when a thread failed."""
        state = self._state
        while True:
            with self._change:
                while not state.completed:
                    if state.stopped or (state.sealed and not state.jobs and not state.in_flight):
                        return
                    self._change.wait()
                ready = state.completed.popleft()
                state.ahead -= ready.job.reader.plan.infos[ready.number].nbytes
                self._change.notify_all()
            yield ready


def _identity(file: SourceFile) -> tuple[int, int]:
    try:
        status = os.fstat(file.fileno())
    except OSError as error:
        raise LoadError(f"{file.path} cannot be examined: {error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns
