"""Device memory: the interface to it, and the reader that fills it through a ring of staging buffers.

On a device the tensors of a file lie packed in slabs, each aligned to 256 bytes. A block is read into a
buffer of the ring and copied from there, asynchronously, while the next one is read; a buffer is used again
when the copies out of it are done. So the host never holds more than the ring.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from headrace.cache.safetensors import TensorInfo
from headrace.loader.memory import as_bytes
from headrace.loader.plan import BLOCK, PAGE, Block, FilePlan
from headrace.loader.readers.fetch import Fetch
from headrace.loader.readers.reader import FileReader, picked
from headrace.loader.source import SourceFile

ALIGNMENT = 256
"""Tensors start at multiples of this in a slab, as the device's own allocator would place them."""


class Event(Protocol):
    """Stands for copies that were started."""

    def wait(self) -> None:
        """Return when they are done; at once if they are already."""
        ...


class Device(Protocol):
    """What the loader needs from a device. Called from several threads."""

    name: str
    torch_device: torch.device
    """Where slabs are, in torch's words."""

    def allocate(self, size: int) -> torch.Tensor:
        """A slab: uint8, `size` bytes, its start aligned to 256 bytes.

        Raises:
            LoadError: the device has not enough memory.
        """
        ...

    def staging(self, size: int) -> torch.Tensor:
        """A host buffer, uint8, from which copies to the device can run by themselves (pinned).

        Raises:
            LoadError: not enough memory for it.
        """
        ...

    def copy_in(self, slab: torch.Tensor, offset: int, host: torch.Tensor) -> None:
        """Start copying `host`, a part of a staging buffer, to `slab` at `offset`. It must stay as it is
        until an event recorded afterwards is done."""
        ...

    def record(self) -> Event:
        """An event that is done when all copies that this thread has started are."""
        ...

    def synchronize(self) -> None:
        """Return when all copies are done and visible to whoever uses the slabs next."""
        ...


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    event: Event | None = None


@dataclass(slots=True)
class Ring:
    """Staging buffers of one block each, made when first needed, at most `limit` of them."""

    device: Device
    limit: int
    _free: queue.LifoQueue[_Buffer] = field(default_factory=queue.LifoQueue)
    _made: list[_Buffer] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def acquire(self) -> _Buffer:
        """A buffer that nothing is copied from any more."""
        with self._lock:
            if self._free.empty() and len(self._made) < self.limit:
                self._made.append(_Buffer(_page_aligned(self.device.staging(BLOCK + 3 * PAGE))))
                return self._made[-1]
        buffer = self._free.get()
        if buffer.event is not None:
            buffer.event.wait()
            buffer.event = None
        return buffer

    def release(self, buffer: _Buffer, event: Event | None) -> None:
        """Give a buffer back; `event` tells when the copies out of it are done."""
        buffer.event = event
        self._free.put(buffer)

    def close(self) -> None:
        """Wait for all copies, then let the buffers go."""
        with self._lock:
            self.device.synchronize()
            self._made.clear()


def _page_aligned(memory: torch.Tensor) -> torch.Tensor:
    """The part of a buffer from its first page on."""
    return memory[-memory.data_ptr() % PAGE :]


class DeviceReader(FileReader):
    """Reads the file into the ring, by `fetch`, and copies to the device."""

    span: ClassVar[str] = "read"

    def __init__(self, file: SourceFile, plan: FilePlan, fetch: Fetch, device: Device, ring: Ring) -> None:
        # Where each tensor lies in its slab: packed anew, because alignment in the file says nothing here.
        self._places: dict[int, int] = {}
        self._sizes = [0] * len(plan.images)
        self._filled = [
            (info, slab) for info, slab in zip(plan.infos, plan.image_of, strict=True) if info.nbytes
        ]
        for info, slab in self._filled:
            self._places[info.start] = self._sizes[slab]
            self._sizes[slab] += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
        self._starts = [plan.header.data_start + info.start for info, _ in self._filled]
        super().__init__(file, plan)
        self._fetch = fetch
        self._device = device
        self._ring = ring

    @property
    def name(self) -> str:
        return self._fetch.name

    def outcome(self) -> str:
        return self._fetch.outcome()

    def fill(self, block: Block) -> None:
        buffer = self._ring.acquire()
        event: Event | None = None
        try:
            first = block.start % PAGE
            pages = -(-(first + block.stop - block.start) // PAGE) * PAGE
            self._fetch.bring(as_bytes(buffer.memory[:pages]), block.start, block.stop)
            memory = buffer.memory[first : first + block.stop - block.start]
            for slab, offset, first, last in self._pieces(block):
                self._device.copy_in(self._image(slab), offset, memory[first:last])
            event = self._device.record()
            if self.check is not None:  # while the copies run
                self.check.arrived(block.start, as_bytes(memory))
        finally:
            self._ring.release(buffer, event)

    def _pieces(self, block: Block) -> list[tuple[int, int, int, int]]:
        """What of a block goes where: (slab, offset in it, from, to in the block), neighbours joined."""
        pieces: list[tuple[int, int, int, int]] = []
        first = max(0, bisect_right(self._starts, block.start) - 1)
        for start, (info, slab) in zip(self._starts[first:], self._filled[first:], strict=True):
            if start >= block.stop:
                break
            begin, end = max(start, block.start), min(start + info.nbytes, block.stop)
            if begin >= end:
                continue
            offset = self._places[info.start] + begin - start
            piece = (slab, offset, begin - block.start, end - block.start)
            if pieces:
                last, before, since, until = pieces[-1]
                if last == slab and until == piece[2] and before + until - since == offset:
                    pieces[-1] = (slab, before, since, piece[3])
                    continue
            pieces.append(piece)
        return pieces

    def _allocate(self, number: int) -> torch.Tensor:
        return self._device.allocate(self._sizes[number])

    def _offsets(self, numbers: Sequence[int]) -> Iterable[int]:
        return [self._places[info.start] for info in picked(self.plan.infos, numbers)]

    def _empty(self, info: TensorInfo) -> torch.Tensor:
        return super()._empty(info).to(self._device.torch_device)

    def take(self, number: int) -> torch.Tensor:
        self._device.synchronize()
        return super().take(number)

    def take_all(self) -> dict[str, torch.Tensor]:
        self._device.synchronize()
        return super().take_all()

    def close(self) -> None:
        self._device.synchronize()  # nothing may be freed that is still being copied to
        super().close()
        self._fetch.close()
