"""Loading to a device: packed slabs, a bounded ring, and nothing left behind after an error."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from support.host_device import HostDevice
from support.safetensors_files import entry, file_bytes

from headrace.cache.errors import LoadError, UsageError
from headrace.cache.safetensors import DTYPE_BITS
from headrace.loader import load, stream
from headrace.loader.memory import as_bytes

SIZES = [(3,), (0, 2), (1 << 20,), (), (777,), (5, 1 << 20), (1 << 8,)]
ENTRIES = [entry(f"t{number}", "BF16", shape) for number, shape in enumerate(SIZES)]
ENTRIES += [entry(dtype, dtype, (4, 3)) for dtype in DTYPE_BITS]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    half = len(ENTRIES) // 2
    (tmp_path / "a.safetensors").write_bytes(file_bytes(ENTRIES[:half], shift=1))
    (tmp_path / "b.safetensors").write_bytes(file_bytes(ENTRIES[half:], shift=3))
    return tmp_path


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor.contiguous().view(-1).view(torch.uint8))) if tensor.numel() else b""


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_on_a_device_are_right_aligned_and_packed(threads: int, model: Path) -> None:
    with HostDevice(delay=0.002) as device:
        loaded = load(model, device, threads=threads)
        assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
            e.name: e.data for e in ENTRIES
        }
        assert all(tensor.data_ptr() % 256 == 0 for tensor in loaded.tensors.values() if tensor.numel())
        assert device.slab_bytes <= loaded.stats.bytes + 256 * len(ENTRIES)
        assert 1 <= device.buffers <= 2 * threads
        assert loaded.digest() == load(model).digest()


def test_small_neighbours_are_copied_together(tmp_path: Path) -> None:
    entries = [entry(f"t{number}", "U8", (512,), number) for number in range(1000)]
    (tmp_path / "m.safetensors").write_bytes(file_bytes(entries))
    with HostDevice() as device:
        load(tmp_path, device, threads=1)
        assert device.copies == 1


def test_a_selection_goes_to_a_device(model: Path) -> None:
    with HostDevice() as device:
        loaded = load(model, device, names=["t5", "t0"], patterns=["F6_*"])
        assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
            one.name: one.data for one in ENTRIES if one.name in ("t5", "t0") or one.name.startswith("F6_")
        }


def test_a_stream_gives_tensors_whose_copies_are_done(model: Path) -> None:
    with HostDevice(delay=0.005) as device:
        got = {name: bits(tensor) for name, tensor in stream(model, device, threads=2)}
    assert got == {one.name: one.data for one in ENTRIES}


def test_a_device_out_of_memory_midway_is_a_clear_error_and_everything_is_freed(model: Path) -> None:
    with HostDevice() as device:
        loaded = load(model / "a.safetensors", device)
        room = device.slab_bytes + 1000  # too little for the second file
        del loaded
    with HostDevice(room=room, delay=0.002) as device:
        with pytest.raises(LoadError, match="no room for"):
            load(model, device, threads=2)
        gc.collect()
        assert device.slab_bytes == 0


def test_dropping_the_tensors_frees_the_device(model: Path) -> None:
    with HostDevice() as device:
        loaded = load(model, device)
        assert device.slab_bytes > 0
        del loaded
        gc.collect()
        assert device.slab_bytes == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_the_error_says_so(model: Path) -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        load(model, "cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here")
def test_tensors_on_a_cuda_device_are_right(model: Path) -> None:
    loaded = load(model, "cuda:0")
    assert {name: bits(t.cpu()) for name, t in loaded.tensors.items()} == {e.name: e.data for e in ENTRIES}
    assert loaded.digest() == load(model).digest()
    assert {name: bits(t.cpu()) for name, t in stream(model, "cuda:0")} == {e.name: e.data for e in ENTRIES}
    with pytest.raises(UsageError, match="does not exist"):
        load(model, "cuda:99")
