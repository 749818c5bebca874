"""One load or stream, by all ranks of a node together.

First the ranks find each other (`meeting`) and agree that they are about to do the same (`agreement`); then
each reads its share, and gets the rest from the others; at the end each waits until all have loaded: if one
fails, is killed or hangs, all fail and name it. How bytes get from one rank to the others:

* page-cache: a rank reads its share through the page cache, where the others find it (`sharing`). Nothing is
  sent. The way on the host, where mapped tensors of all ranks are the same memory; and for whatever is just
  being staged or is in memory already.
* exchange: the share is read any way, and broadcast block by block (`exchange`): by NCCL between devices, by
  gloo on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from headrace.cache.errors import LoadError, UsageError
from headrace.loader.plan import Block, FilePlan
from headrace.loader.ranks.agreement import Facts, compare, versions
from headrace.loader.ranks.circle import Circle
from headrace.loader.ranks.exchange import (
    Broadcasts,
    Exchange,
    ExchangeDeviceReader,
    ExchangeFetch,
    Windows,
    over_loopback,
)
from headrace.loader.ranks.meeting import meet
from headrace.loader.ranks.sharing import own_first
from headrace.loader.readers.fetch import Fetch
from headrace.loader.readers.reader import FileReader
from headrace.loader.sinks.device import Device, Ring
from headrace.loader.source import SourceFile
from headrace.loader.verify import Run

HandOver = Literal["auto", "page-cache", "exchange"]

_WARM = 0.5
"""When the page cache holds this part of what is to be read, it is not read again past it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """How the ranks of a process group load together.

    Attributes:
        group: every rank of it must call `load` (or `stream`), in the same order and with the same arguments.
            Those on one node share their reading; the others do not matter to each other.
        hand_over: how bytes get from one rank to the others, "page-cache" or "exchange" (see the module), or
            "auto": "page-cache", except where a device can be reached through the group and the bytes are not
            in memory, or direct reads are asked for.
        timeout: seconds after which a rank that is silent, or loads nothing, counts as failed. One that ends
            is missed at once.
        wait: seconds to wait for a rank that has not called `load` yet.
    """

    group: dist.ProcessGroup
    hand_over: HandOver = "auto"
    timeout: float = 60.0
    wait: float = 300.0

    def __post_init__(self) -> None:
        if self.hand_over not in get_args(HandOver):
            ways = ", ".join(get_args(HandOver))
            raise UsageError(f"hand_over must be one of {ways}, not {self.hand_over!r}")
        if self.timeout <= 0 or self.wait <= 0:
            raise UsageError("timeout and wait of Ranks must be positive numbers of seconds")


@dataclass(frozen=True, slots=True)
class Intent:
    """What one rank is about to read, as far as it decides how bytes are handed over.

    Attributes:
        direct: reads around the page cache are asked for.
        complete: nothing of it is still being staged.
        present: the part of it that the page cache holds, 0 to 1.
        whole_plan: every rank reads the same bytes, and takes them all at once.
        device: torch's name for the type of the device to load to; "" for host memory.
    """

    direct: bool
    complete: bool
    present: float
    whole_plan: bool
    device: str


@dataclass(slots=True)
class Session:
    """This rank's part in loading together.

    Attributes:
        device: torch's name for the type of the device to load to; "" for host memory.
        disagreement: of the ranks on what to load, if they do not agree.
        why: one sentence on how bytes are handed over, once that is decided.
    """

    ranks: Ranks
    circle: Circle
    store: Store
    device: str = ""
    why: str = ""
    disagreement: LoadError | None = None
    exchange: Exchange | None = None
    _windows: Windows | None = None
    _through_device: bool = False
    _progress: Callable[[], int] | None = None

    @property
    def index(self) -> int:
        """Of this rank on its node, from 0."""
        return self.circle.members.index(self.circle.rank)

    @property
    def size(self) -> int:
        """How many ranks the node has."""
        return len(self.circle.members)

    def watch(self, progress: Callable[[], int] | None, stop: Callable[[], None]) -> None:
        """From now on be judged by others, and stop with them.

        Args:
            progress: gives a number that changes as this rank's own work is done; None: only living counts.
            stop: called in another thread when another rank failed.
        """
        self._progress = progress
        self.circle.on_failure = stop
        if self.circle.failure is not None:
            stop()

    def agree(self, facts: Facts, intent: Intent) -> None:
        """Make sure that all ranks are about to do the same, and decide how they share it.

        Raises:
            LoadError: they do not agree, or a rank failed meanwhile.
        """
        kind = ("the kind of device", self.device or "host memory")
        mine = {
            "facts": [*versions(), ("the hand-over", self.ranks.hand_over), kind, *facts],
            "intent": [intent.direct, intent.complete, intent.present, intent.whole_plan, intent.device],
            "reachable": self._reaches(intent.device),
        }
        answers = self.circle.gather(mine)
        said = {
            rank: [(word, value) for word, value in answer["facts"]]
            for rank, answer in zip(self.circle.members, answers, strict=True)
        }
        self.disagreement = compare(said)
        if self.disagreement is not None:
            raise self.disagreement
        intents = [Intent(*answer["intent"]) for answer in answers]
        reachable = all(answer["reachable"] for answer in answers)
        way, why = decide(self.ranks.hand_over, intents, reachable)
        self.why = f"rank {self.circle.rank}: one of {self.size} on this node, {way}: {why}"
        if way == "exchange" and self.size > 1:
            self._open_exchange(through_device=reachable)
        if all(intent.complete for intent in intents):
            self.circle.progress = self._done

    def _done(self) -> int | None:
        if self._progress is None:
            return None
        if self.exchange is not None and self.exchange.waits_for_others():
            return None
        return self._progress()

    def _reaches(self, device: str) -> bool:
        """Whether the group's ranks are those of this node, and it can send from device to device."""
        if not device or dist.get_world_size(self.ranks.group) != self.size:
            return False
        backends = dict(one.split(":") for one in dist.get_backend_config(self.ranks.group).split(","))
        # gloo would take the way through the host's memory, and its loopback.
        return device in backends and (device == "cpu" or backends[device] != "gloo")

    def _open_exchange(self, *, through_device: bool) -> None:
        if through_device:
            self._through_device = True
            broadcasts = Broadcasts(self.ranks.group, own=False)
        else:
            # Much longer than it takes the circle to find who fails: gloo could only say that somebody does.
            backend = over_loopback(self.store, self.index, self.size, 3 * self.ranks.timeout)
            broadcasts = Broadcasts(backend, own=True)
        self.exchange = Exchange(broadcasts, self.index, self.size)
        self.exchange.check, self.exchange.blame = self.circle.check, self.circle.blame

    # -- what reading asks for ----------------------------------------------------------------------------

    @property
    def through_page_cache(self) -> bool:
        """Bytes must be read through the page cache, where the others look for them."""
        return self.exchange is None and self.size > 1

    def order(self, blocks: list[Block], size: int) -> list[Block]:
        """The order in which this rank reads its blocks of a file of `size` bytes."""
        return own_first(blocks, size, self.index, self.size) if self.through_page_cache else blocks

    def fetch(self, file: SourceFile, fetch: Fetch) -> Fetch:
        """What brings a file's bytes into host memory, given what could bring them all by itself."""
        if self.exchange is None or self._through_device:
            return fetch
        return ExchangeFetch(file, fetch, self.exchange)

    def planned(self, file: SourceFile, reader: FileReader) -> None:
        """The next file will be read by this reader. Called file by file, on all ranks in the same order."""
        if self.exchange is not None:
            for block in reader.blocks():
                self.exchange.plan(file.path, block.parts if isinstance(block, Run) else (block,))

    def device_reader(
        self, file: SourceFile, plan: FilePlan, fetch: Fetch, device: Device, ring: Ring
    ) -> FileReader | None:
        """What brings a file into device memory where bytes come from device to device, else None."""
        if self.exchange is None or not self._through_device:
            return None
        if self._windows is None:
            self._windows = Windows(device)
        return ExchangeDeviceReader(file, plan, fetch, device, ring, self.exchange, self._windows)

    def stop(self) -> None:
        """Let no thread wait for other ranks' blocks any more."""
        if self.exchange is not None:
            self.exchange.stop()

    def check(self) -> None:
        """Raises: LoadError: another rank has failed."""
        self.circle.check()

    def finish(self) -> None:
        """Return when every rank has loaded everything.

        Raises:
            LoadError: one has not.
        """
        self.circle.gather(None, last=True)

    def close(self, failure: BaseException | None) -> None:
        """Leave; the others fail if this rank has not finished."""
        said = str(failure).rstrip(".") if isinstance(failure, Exception) else ""
        if failure is not None and not said:
            said = type(failure).__name__
        self.circle.leave(said)
        if self.exchange is not None:
            self.exchange.close()


def decide(asked: HandOver, intents: Sequence[Intent], reachable: bool) -> tuple[HandOver, str]:
    """How bytes are handed over, and why; the same on all ranks, because all know the same.

    Args:
        asked: what the user wants.
        intents: of all ranks.
        reachable: the group reaches all devices.
    """
    if not all(one.complete for one in intents):
        return "page-cache", "it is still being staged, so its bytes are just there"
    if not all(one.whole_plan for one in intents):
        return "page-cache", "ranks read different bytes, or take them one by one"
    if asked != "auto":
        return asked, "as asked"
    if all(one.direct for one in intents):
        return "exchange", "direct reads leave nothing in the page cache"
    if not all(one.device for one in intents):
        return "page-cache", "on the host it costs the least"
    if min(one.present for one in intents) >= _WARM:
        return "page-cache", "most of it is there already"
    if reachable:
        return "exchange", "the devices are connected by the group"
    return "page-cache", "the group does not connect the devices"


@contextlib.contextmanager
def together(ranks: Ranks | dist.ProcessGroup | None) -> Iterator[Session | None]:
    """Load together with the other ranks of the node: the context of a whole load.

    However it is left before `finish`, the others fail. Where it is another rank that failed, that is raised.
    """
    if ranks is None:
        yield None
        return
    if not isinstance(ranks, Ranks):
        ranks = Ranks(ranks)
    meeting = meet(ranks.group, ranks.timeout, ranks.wait)
    session = Session(ranks, meeting.circle, meeting.store)
    try:
        yield session
    except BaseException as error:
        cause = session.circle.failure
        session.close(error)
        if cause is not None and isinstance(error, LoadError) and error not in (cause, session.disagreement):
            raise cause from error
        raise
    session.close(None)
