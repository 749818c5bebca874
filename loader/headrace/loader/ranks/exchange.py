"""Handing blocks over by broadcast: each is read by one rank and sent to all.

For what the page cache cannot do: ranks whose tensors go to devices that are connected faster than the host
(NCCL), and direct reads, which leave nothing behind in the page cache (gloo). On the host this costs more CPU
time than the page cache (docs/decisions/0007-ranks.md).

All ranks have the same blocks in the same order. Each broadcast has a number, and is started in its turn:
collectives must be issued in one order everywhere. Several are under way at once, one for each thread, which
is also what bounds the memory.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from headrace.cache.errors import LoadError
from headrace.loader.memory import as_bytes
from headrace.loader.plan import BLOCK, PAGE, Block, FilePlan
from headrace.loader.ranks.sharing import owner
from headrace.loader.readers.fetch import Fetch
from headrace.loader.sinks.device import Device, DeviceReader, Ring
from headrace.loader.source import SourceFile


class HandOverStopped(LoadError):
    """A block was not handed over because this rank's loading had failed elsewhere."""


class Backend(Protocol):
    """What is needed of a process group."""

    def broadcast(self, tensors: list[torch.Tensor], opts: dist.BroadcastOptions, /) -> dist.Work: ...


_LOOK = datetime.timedelta(seconds=0.2)  # between two looks whether a rank has failed
_POLL = 0.0005  # seconds between two looks whether a device is done


class Broadcasts:
    """Sends one rank's bytes to all others, through a process group.

    Args:
        backend: of exactly the ranks of this node, in their order.
        own: the backend was made for this load alone, and goes with it.
    """

    def __init__(self, backend: Backend, *, own: bool) -> None:
        self._backend: Backend | None = backend
        self._own = own

    def start(self, tensor: torch.Tensor, source: int) -> dist.Work:
        """Begin: `tensor` is sent by the rank with index `source`, and received by the others. Its memory must
        live as long as it does: an operation that is given up goes on until the backend's timeout."""
        assert self._backend is not None
        options = dist.BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        return self._backend.broadcast([tensor], options)

    def finish(self, work: dist.Work, check: Callable[[], None]) -> None:
        """Return when the bytes are there, or when `check`, called now and then, raises.

        Raises:
            RuntimeError: the backend says that it did not work.
        """
        while self._own:  # gloo: this waits for the bytes
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it may just have ended well; if not, this raises again
                    return
            check()
        # On a device, waiting would only make a stream wait, and could not be given up.
        while not work.is_completed():
            check()
            time.sleep(_POLL)
        work.wait()

    def close(self) -> None:
        """Let the backend go, if it is our own: in a thread, because that takes until its operations end."""
        if self._own and self._backend is not None:
            dying = [self._backend]
            self._backend = None  # not here: the last reference must go in the thread
            threading.Thread(target=dying.clear, name="headrace-ranks-end", daemon=True).start()
        self._backend = None


def over_loopback(store: Store, index: int, ranks: int, timeout: float) -> Backend:
    """gloo between the ranks of a node, of our own: what goes wrong in it breaks no group of the user's.

    Raises:
        LoadError: they cannot connect.
    """
    gloo: Any = dist.ProcessGroupGloo  # torch's own annotations lack what it offers
    options = gloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    try:
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        made: Backend = gloo(store, index, ranks, options)
    except RuntimeError as error:
        raise LoadError(f"the ranks cannot connect to each other by gloo: {error}") from error
    return made


class Exchange:
    """The broadcasts of one load.

    Attributes:
        index: of this rank on its node.
        check: raises when another rank has failed.
        blame: waits a moment until one has, if one has, and raises then.
    """

    def __init__(self, broadcasts: Broadcasts, index: int, ranks: int) -> None:
        self.index = index
        self.check: Callable[[], None] = lambda: None
        self.blame: Callable[[], None] = lambda: None
        self._reading = 0  # threads of this rank that read a block now
        self._waiting = 0  # threads that wait for the turn of theirs, or for what another rank sends
        self._broadcasts = broadcasts
        self._ranks = ranks
        self._numbers: dict[tuple[str, int], int] = {}
        self._change = threading.Condition()
        self._next = 0
        self._stopped = False

    def plan(self, path: str, blocks: Sequence[Block]) -> None:
        """Number the blocks of another file."""
        for block in blocks:
            self._numbers[path, block.start] = len(self._numbers)

    def hand_over(self, path: str, start: int, tensor: torch.Tensor, read: Callable[[], None]) -> None:
        """Fill `tensor` with a block: with `read` if it falls to this rank, else with what another sends.

        Raises:
            LoadError: the block could not be read, or another rank failed.
        """
        number = self._numbers[path, start]
        source = owner(number, self._ranks)
        good = waiting = False
        try:
            if source == self.index:
                with self._change:
                    self._reading += 1
                try:
                    read()
                finally:
                    with self._change:
                        self._reading -= 1
            with self._change:
                self._waiting += 1
                waiting = True
                self._change.wait_for(lambda: self._stopped or self._next == number)
                self._go_on()
                work = self._broadcasts.start(tensor, source)
                self._next += 1
                self._change.notify_all()
            self._broadcasts.finish(work, self._go_on)
            good = True
        except RuntimeError as error:
            self.blame()
            raise LoadError(f"bytes {start} and following of {path} were not handed over: {error}") from error
        finally:
            with self._change:
                self._waiting -= waiting
            if not good:
                self.stop()

    def waits_for_others(self) -> bool:
        """Whether it is not this rank that keeps the others waiting."""
        with self._change:
            return self._waiting > 0 and not self._reading

    def _go_on(self) -> None:
        self.check()
        if self._stopped:
            raise HandOverStopped("loading stopped, because another part of it failed")

    def stop(self) -> None:
        """Let no thread wait for its turn any more."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def close(self) -> None:
        self.stop()
        self._broadcasts.close()


class ExchangeFetch:
    """A `Fetch` that reads this rank's blocks of a file by another one, and receives the others."""

    def __init__(self, file: SourceFile, fetch: Fetch, exchange: Exchange) -> None:
        self._file = file
        self._fetch = fetch
        self._exchange = exchange

    @property
    def name(self) -> str:
        return self._fetch.name

    def bring(self, pages: memoryview, start: int, stop: int) -> None:
        first = start % PAGE
        tensor = torch.frombuffer(pages[first : first + stop - start], dtype=torch.uint8)
        self._exchange.hand_over(
            self._file.path, start, tensor, lambda: self._fetch.bring(pages, start, stop)
        )

    def outcome(self) -> str:
        return self._fetch.outcome()

    def close(self) -> None:
        self._fetch.close()


class Windows:
    """Device memory through which blocks go to their slabs: one block each, made when first needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[torch.Tensor]:
        """A window that nobody else uses. One whose use failed is not used again: it may still be written."""
        with self._lock:
            window = self._free.pop() if self._free else None
        if window is None:
            window = self._device.allocate(BLOCK)
        yield window
        with self._lock:
            self._free.append(window)


class ExchangeDeviceReader(DeviceReader):
    """Reads this rank's blocks and receives the others, all in device memory: for NCCL."""

    shows: ClassVar[bool] = False  # what others have read is never on this host

    def __init__(
        self,
        file: SourceFile,
        plan: FilePlan,
        fetch: Fetch,
        device: Device,
        ring: Ring,
        exchange: Exchange,
        windows: Windows,
    ) -> None:
        super().__init__(file, plan, fetch, device, ring)
        self._exchange = exchange
        self._windows = windows

    def fill(self, block: Block) -> None:
        with self._windows.one() as memory:
            window = memory[: block.stop - block.start]
            self._exchange.hand_over(self.file.path, block.start, window, lambda: self._read(block, window))
            for slab, offset, first, last in self._pieces(block):
                self._device.copy_in(self._image(slab), offset, window[first:last])
            self._device.record().wait()

    def _read(self, block: Block, window: torch.Tensor) -> None:
        buffer = self._ring.acquire()
        try:
            first = block.start % PAGE
            pages = -(-(first + block.stop - block.start) // PAGE) * PAGE
            self._fetch.bring(as_bytes(buffer.memory[:pages]), block.start, block.stop)
            self._device.copy_in(window, 0, buffer.memory[first : first + block.stop - block.start])
            self._device.record().wait()  # the broadcast may run on another stream
        finally:
            self._ring.release(buffer, None)
