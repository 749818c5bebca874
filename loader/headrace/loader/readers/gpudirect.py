"""GPUDirect Storage: from the disk into device memory, past the host's memory, through the library kvikio.

Only where it is really there. Without the driver, kvikio does the same as this loader's own pinned ring, only
with less care, so it is then refused: a compatibility mode has nothing to offer here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from headrace.cache.errors import LoadError
from headrace.loader.plan import Block, FilePlan
from headrace.loader.readers.adaptive import AdaptiveFetch
from headrace.loader.readers.fetch import Fetch, became_shorter
from headrace.loader.sinks.device import Device, DeviceReader, Ring
from headrace.loader.source import SourceFile

_log = logging.getLogger(__name__)


class GpuDirectRefusedError(Exception):
    """GPUDirect cannot be used; the text, which fits after "because", says why."""


def device_reader(file: SourceFile, plan: FilePlan, fetch: Fetch, device: Device, ring: Ring) -> DeviceReader:
    """For tensors on a device: through GPUDirect where the autopilot found a file that is on the disk alone and
    that works, else through the ring."""
    if isinstance(fetch, AdaptiveFetch) and fetch.cold:
        try:
            return GpuDirectReader(file, plan, fetch, device, ring, check_gpudirect(device))
        except GpuDirectRefusedError as refusal:
            _log.debug("%s is not read through GPUDirect Storage, because %s", file.path, refusal)
    return DeviceReader(file, plan, fetch, device, ring)


def check_gpudirect(device: Device) -> Any:
    """The library kvikio, when it can read from a disk straight into this device.

    Raises:
        GpuDirectRefusedError: it cannot.
    """
    if device.torch_device.type != "cuda":
        raise GpuDirectRefusedError(f"{device.name} is not a CUDA device")
    if importlib.util.find_spec("kvikio") is None:
        raise GpuDirectRefusedError("the library kvikio is not installed")
    try:
        kvikio = importlib.import_module("kvikio")
        driver = importlib.import_module("kvikio.cufile_driver")
        there = bool(driver.DriverProperties().is_gds_available)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise GpuDirectRefusedError(f"kvikio cannot be used ({error})") from error
    if not there:
        raise GpuDirectRefusedError("there is no GPUDirect Storage driver here")
    return kvikio


class GpuDirectReader(DeviceReader):
    """Reads each piece of a block straight to where its tensors lie on the device.

    Raises:
        GpuDirectRefusedError: this file cannot be read that way.
    """

    def __init__(
        self, file: SourceFile, plan: FilePlan, fetch: Fetch, device: Device, ring: Ring, kvikio: Any
    ) -> None:
        if not file.complete:
            raise GpuDirectRefusedError("it is still being written")
        try:
            self._handle = kvikio.CuFile(f"/proc/self/fd/{file.fileno()}", "r")
        except (OSError, RuntimeError) as error:
            raise GpuDirectRefusedError(f"kvikio cannot open it ({error})") from error
        super().__init__(file, plan, fetch, device, ring)

    @property
    def name(self) -> str:
        return "gpudirect"

    def outcome(self) -> str:
        return "it came through GPUDirect Storage"

    def fill(self, block: Block) -> None:
        if self.check is not None:  # the host has to see what it verifies
            super().fill(block)
            return
        for slab, offset, first, last in self._pieces(block):
            target = self._image(slab)[offset : offset + last - first]
            while len(target):
                at = block.start + last - len(target)
                try:
                    count = self._handle.raw_read(target, len(target), at)
                except (OSError, RuntimeError) as error:
                    raise LoadError(
                        f"{self.file.path} cannot be read at byte {at} through GPUDirect Storage ({error}): "
                        "use read_path='buffered'"
                    ) from error
                if not count:
                    raise became_shorter(self.file)
                target = target[count:]

    def close(self) -> None:
        super().close()
        self._handle.close()
