"""GPUDirect is taken only where it is really there; everything else goes through the ring, and is right."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from support.host_device import HostDevice
from support.safetensors_files import entry, file_bytes

from headrace.loader import load
from headrace.loader.memory import as_bytes
from headrace.loader.readers.gpudirect import GpuDirectRefusedError, check_gpudirect
from headrace.loader.sinks.cuda import CudaDevice

NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"
)


class Named(HostDevice):
    """The host double under the name of a CUDA device: what is refused is refused before any device call."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("cuda", 0)


def test_it_is_refused_for_a_device_that_is_not_cuda() -> None:
    with (
        HostDevice() as device,
        pytest.raises(GpuDirectRefusedError, match="host double is not a CUDA device"),
    ):
        check_gpudirect(device)


@pytest.mark.skipif(importlib.util.find_spec("kvikio") is not None, reason="kvikio is installed here")
def test_it_is_refused_where_kvikio_is_not_installed() -> None:
    with Named() as device, pytest.raises(GpuDirectRefusedError, match="kvikio is not installed"):
        check_gpudirect(device)


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (
            "raise ImportError('libcufile.so.0: cannot open shared object file')",
            r"cannot be used \(libcufile",
        ),
        ("raise RuntimeError('CUDA driver is missing')", r"cannot be used \(CUDA driver is missing\)"),
        ("", "cannot be used"),  # a version without what is asked for
    ],
)
def test_it_is_refused_where_kvikio_cannot_be_used(
    package: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvikio").mkdir()
    (tmp_path / "kvikio" / "__init__.py").write_text(package)
    (tmp_path / "kvikio" / "cufile_driver.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("kvikio", "kvikio.cufile_driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        with Named() as device, pytest.raises(GpuDirectRefusedError, match=reason):
            check_gpudirect(device)
    finally:
        for name in ("kvikio", "kvikio.cufile_driver"):
            sys.modules.pop(name, None)


def test_what_is_refused_goes_through_the_ring(tmp_path: Path) -> None:
    one = entry("a", "BF16", (3_000_001,))
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes([one], shift=3))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with HostDevice() as device:
        loaded = load(path, device)
        assert bytes(as_bytes(loaded.tensors["a"].view(torch.uint8))) == one.data
        assert device.buffers >= 1
        assert loaded.stats.read_path in ("direct", "buffered", "mixed")


@NO_CUDA
def test_a_cuda_device_without_the_driver_is_told_apart() -> None:
    device = CudaDevice(torch.device("cuda", 0))
    try:
        check_gpudirect(device)
    except GpuDirectRefusedError as refusal:
        assert str(refusal)
