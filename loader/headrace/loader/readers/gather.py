"""Gathering many short ranges of a file into memory: slices of columns, and of fused tensors.

The ranges come through the page cache, which all ranks of a node share: what one rank's page holds of
another's columns is not read from the disk twice. Where the page cache has too few of them, all that a block
needs is asked for first, so that the disk has many requests to work on.

Narrow ranges are copied out of a mapping by process_vm_readv(2), a thousand in one call, during which other
threads run; a call for each takes longer and holds them up. Where the file has become shorter this fails with an
error, which a copy by this process would not live to see. Where the kernel refuses it (sandboxes do), or cannot
map the file, a call for each range must do.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from typing import ClassVar

import torch

from headrace.loader.cuts import Comb
from headrace.loader.gathering import SCRATCH, GatherBlock, GatherPlan, Way
from headrace.loader.memory import anonymous, as_bytes, ask_for, resident
from headrace.loader.plan import PAGE, Block
from headrace.loader.readers.fetch import BufferedFetch, read_into
from headrace.loader.readers.reader import FileReader
from headrace.loader.sinks.device import Device, DeviceReader, Event, Ring
from headrace.loader.source import SourceFile

_PRESENT = (
    0.99  # the part of a block's extent that the page cache holds where asking would cost more than it saves
)
_AT_ONCE = 1024  # ranges in one call: the kernel's IOV_MAX

_copy_from_process = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _copy_from_process is not None:
    _copy_from_process.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    _copy_from_process.restype = ctypes.c_ssize_t


class Gatherer:
    """Gathers blocks of one file; called by several threads at once."""

    def __init__(self, file: SourceFile, plan: GatherPlan) -> None:
        self._file = file
        self._plan = plan
        self._local = threading.local()  # each thread's scratch
        self._refused = _copy_from_process is None  # to copy from a mapping

    def gather(self, block: Block, target: torch.Tensor) -> None:
        """Fill `target`, uint8 with as many elements as the block gathers.

        Raises:
            LoadError: bytes cannot be read, or the file became shorter.
        """
        assert isinstance(block, GatherBlock)
        comb, way = self._plan.combs[block.segment], self._plan.ways[block.segment]
        if way is Way.WHOLE_ROWS:
            self._whole_rows(comb, block, target)
            return
        self._ask_for(comb, block)
        if way is Way.MANY_TEETH and not self._refused:
            self._many_teeth(comb, block, target)
        else:
            self._tooth_by_tooth(comb, block, target)

    def _ask_for(self, comb: Comb, block: GatherBlock) -> None:
        """Have the disk work on everything at once, unless it is in the page cache."""
        descriptor = self._file.fileno()
        part = resident(descriptor, block.start, block.stop)
        if part is not None and part >= _PRESENT:
            return
        data_start = self._plan.header.data_start
        for start, stop in comb.pieces(block.first, block.last):
            ask_for(descriptor, data_start + start, data_start + stop)

    def _tooth_by_tooth(self, comb: Comb, block: GatherBlock, target: torch.Tensor) -> None:
        memory = as_bytes(target)
        data_start = self._plan.header.data_start
        done = 0
        for start, stop in comb.pieces(block.first, block.last):
            read_into(self._file, memory[done : done + stop - start], data_start + start)
            done += stop - start

    def _whole_rows(self, comb: Comb, block: GatherBlock, target: torch.Tensor) -> None:
        scratch = self._scratch()
        each = max(1, SCRATCH // comb.pitch)
        row, end = block.first // comb.row_bytes, block.last // comb.row_bytes
        lead = comb.teeth[0][0]
        extent = sum(comb.teeth[-1]) - lead  # from a row's first tooth to the end of its last
        done = 0
        while row < end:
            count = min(each, end - row)
            start = self._plan.header.data_start + comb.start + row * comb.pitch + lead
            read_into(self._file, as_bytes(scratch[: (count - 1) * comb.pitch + extent]), start)
            rows = target[done : done + count * comb.row_bytes].view(count, comb.row_bytes)
            column = 0
            for offset, width in comb.teeth:
                teeth = scratch.as_strided((count, width), (comb.pitch, 1), offset - lead)
                rows[:, column : column + width].copy_(teeth)
                column += width
            done += count * comb.row_bytes
            row += count

    def _scratch(self) -> torch.Tensor:
        scratch: torch.Tensor | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = anonymous(SCRATCH, "reading slices")
        return scratch

    def _many_teeth(self, comb: Comb, block: GatherBlock, target: torch.Tensor) -> None:
        """As `_tooth_by_tooth`, in few calls; the block is whole rows."""
        base = block.start // PAGE * PAGE
        try:
            mapping = mmap.mmap(
                self._file.fileno(),
                block.stop - base,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,  # what ctypes asks for to tell an address
                offset=base,
            )
        except (OSError, ValueError):  # this file system cannot map, or the file became shorter
            self._tooth_by_tooth(comb, block, target)
            return
        with mapping:
            mapping.madvise(mmap.MADV_RANDOM)  # a page that is not there must not bring its neighbours
            anchor = ctypes.c_char.from_buffer(mapping)
            good = self._copy(comb, block, target, ctypes.addressof(anchor) - base)
            del anchor
        if not good:
            self._tooth_by_tooth(comb, block, target)

    def _copy(self, comb: Comb, block: GatherBlock, target: torch.Tensor, origin: int) -> bool:
        """Copy from the mapping, in which byte 0 of the file would lie at `origin`; False if that fails."""
        rows = torch.arange(block.first // comb.row_bytes, block.last // comb.row_bytes) * comb.pitch
        teeth = torch.tensor(comb.teeth)
        ranges = torch.empty((len(rows), len(teeth), 2), dtype=torch.int64)  # struct iovec: address, length
        ranges[..., 0] = rows[:, None] + teeth[:, 0] + (origin + self._plan.header.data_start + comb.start)
        ranges[..., 1] = teeth[:, 1]
        ranges = ranges.view(-1, 2)
        address, process = target.data_ptr(), os.getpid()
        assert _copy_from_process is not None
        for number in range(0, len(ranges), _AT_ONCE):
            some = ranges[number : number + _AT_ONCE]
            size = int(some[:, 1].sum())
            into = (ctypes.c_int64 * 2)(address, size)
            copied = _copy_from_process(process, into, 1, some.data_ptr(), len(some), 0)
            if copied < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
                self._refused = True
            if copied != size:
                return False
            address += size
        return True


class GatherReader(FileReader):
    """Gathers into private memory, allocated image by image when its first block is filled."""

    span: ClassVar[str] = "gather"
    shows: ClassVar[bool] = False

    def __init__(self, file: SourceFile, plan: GatherPlan) -> None:
        super().__init__(file, plan)
        self._gatherer = Gatherer(file, plan)

    @property
    def name(self) -> str:
        return "buffered"

    def fill(self, block: Block) -> None:
        assert isinstance(block, GatherBlock)
        segment = self.plan.segments[block.segment]
        image = self._image(segment.image)
        self._gatherer.gather(block, image[segment.offset + block.first : segment.offset + block.last])


class DeviceGatherReader(DeviceReader):
    """Gathers into the ring, and copies to the device."""

    span: ClassVar[str] = "gather"
    shows: ClassVar[bool] = False

    def __init__(self, file: SourceFile, plan: GatherPlan, device: Device, ring: Ring) -> None:
        super().__init__(file, plan, BufferedFetch(file), device, ring)
        self._gatherer = Gatherer(file, plan)

    def fill(self, block: Block) -> None:
        assert isinstance(block, GatherBlock)
        segment = self.plan.segments[block.segment]
        buffer = self._ring.acquire()
        event: Event | None = None
        try:
            memory = buffer.memory[: block.last - block.first]
            self._gatherer.gather(block, memory)
            self._device.copy_in(
                self._image(segment.image), self._offset(block.segment) + block.first, memory
            )
            event = self._device.record()
        finally:
            self._ring.release(buffer, event)
