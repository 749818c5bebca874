"""The loaders that are compared, and the raw reads that bound them.

Each is imported before anything is forked; one that is not installed is reported as absent. Each returns all
tensors of the model in memory that stays valid (`Held`), on the host or on the device that was asked for.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.repetition import Held

BLOCK = 8 << 20
THREADS = 2

Load = Callable[[Path, str], Held]


@dataclass(frozen=True, slots=True)
class Loader:
    """A way to bring a model in.

    Attributes:
        name: of `LOADERS`.
        prepare: gets the folder and the device, in the forked process, and gives what is measured.
        modules: that it needs.
        environ: variables that it reads.
        raw: no tensors, just the bytes.
        needs_cuda: can do nothing on the host.
    """

    name: str
    prepare: Callable[[Path, str], Callable[[], Held]]
    modules: tuple[str, ...] = ("torch",)
    environ: dict[str, str] = field(default_factory=dict)
    raw: bool = False
    needs_cuda: bool = False

    def absent(self, device: str) -> str | None:
        """Why it cannot take part; None if it can. Imports what it needs."""
        if self.needs_cuda and not device.startswith("cuda"):
            return "needs a CUDA device"
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"not installed: {error}"
        return None


def shards(model: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(model.glob("*.safetensors"))


def _simple(load: Load) -> Callable[[Path, str], Callable[[], Held]]:
    def prepare(model: Path, device: str) -> Callable[[], Held]:
        _wake(device)
        return lambda: load(model, device)

    return prepare


def _wake(device: str) -> None:
    """Create the device's context: it costs the same for everybody."""
    if device.startswith("cuda"):
        import torch

        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)


def _arrived(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


# -- headrace


def _headrace(read_path: Any, **arguments: Any) -> Callable[[Path, str], Callable[[], Held]]:
    def load_model(model: Path, device: str) -> Held:
        from headrace.loader import load

        loaded = load(model, device, read_path=read_path, **arguments)
        _arrived(device)
        return Held(loaded.tensors, notes=_notes(loaded.stats, device))

    return _simple(load_model)


def _headrace_verified(model: Path, device: str) -> Held:
    """From a store (`model` is its `domains/<domain>/snapshots/<id>/files`), all digests compared."""
    from headrace.cache.reading import StoredSnapshot
    from headrace.cache.store import Store
    from headrace.loader import load

    with Store.open(model.parents[4], writable=False) as store:
        domain = store.domain(model.parents[2].name)
        source = StoredSnapshot(domain, domain.snapshot(model.parent.name), name=os.fspath(model))
    try:
        loaded = load(source, device, verify="always")
    finally:
        source.close()
    _arrived(device)
    return Held(loaded.tensors, notes=_notes(loaded.stats, device))


def _notes(stats: Any, device: str) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    if device.startswith("cuda"):
        import torch

        notes["device_peak"] = torch.cuda.max_memory_allocated(device)
    return notes | {
        "read_path": stats.read_path,
        "explain": list(stats.explain),
        "outside": _outside(stats),
        "outside_trace": stats.outside,
        "trace": {span.name: round(span.seconds, 4) for span in stats.trace},
    }


_READING = ("read", "populate", "direct", "wait", "copy", "verify")


def _outside(stats: Any) -> float:
    """Seconds outside read calls, at most: as if all threads that read had always read at the same time."""
    from headrace.loader.memory import cores
    from headrace.loader.transfer import DEFAULT_THREADS

    # What is mapped here is in the page cache.
    threads = cores() if stats.read_path == "mapped" else DEFAULT_THREADS
    reading = sum(span.seconds for span in stats.trace if span.name in _READING)
    return float(stats.seconds - reading / threads)


# -- peers


def _load_file(model: Path, device: str) -> Held:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in shards(model):
        tensors.update(load_file(path, device=device))
    _arrived(device)
    return Held(tensors)


def _safe_open_clone(model: Path, device: str) -> Held:
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in shards(model):
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensors[name] = file.get_tensor(name).clone()
    _arrived(device)
    return Held(tensors)


def _runai(model: Path, device: str) -> Held:
    from runai_model_streamer import SafetensorsStreamer

    streamer = SafetensorsStreamer()
    with streamer:
        streamer.stream_files([str(path) for path in shards(model)], device=device)
        tensors = dict(streamer.get_tensors())
    _arrived(device)
    return Held(tensors, keep=streamer)


def _fastsafetensors(model: Path, device: str) -> Held:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, device=device, nogds=True)
    loader.add_filenames({0: [str(path) for path in shards(model)]})
    buffers = loader.copy_files_to_device()
    tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    _arrived(device)
    return Held(tensors, keep=(loader, buffers))


def _instanttensor(model: Path, device: str) -> Held:
    import instanttensor
    import torch

    with instanttensor.safe_open(
        [str(path) for path in shards(model)], framework="pt", device=torch.device(device)
    ) as file:
        tensors = dict(file.tensors())
    _arrived(device)
    return Held(tensors)


# -- raw reads


def _raw(flags: int) -> Callable[[Path, str], Callable[[], Held]]:
    def prepare(model: Path, device: str) -> Callable[[], Held]:
        return lambda: read_raw(shards(model), flags)

    return prepare


def read_raw(paths: Sequence[Path], flags: int) -> Held:
    """Read whole files with two threads into fresh memory made of huge pages, and nothing else."""
    descriptors = [os.open(path, os.O_RDONLY | flags) for path in paths]
    memories, ranges, jobs = [], [], []
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        room = -(-size // BLOCK) * BLOCK  # direct reads are of whole sectors
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memories.append(memory)
        ranges.append((ctypes.addressof(ctypes.c_char.from_buffer(memory)), size))
        view = memoryview(memory)
        jobs += [(descriptor, view[at : at + BLOCK], at, size) for at in range(0, size, BLOCK)]
    pending: Iterator[tuple[int, memoryview, int, int]] = iter(jobs)
    lock = threading.Lock()
    failed: list[OSError] = []

    def work() -> None:
        while not failed:
            with lock:
                job = next(pending, None)
            if job is None:
                return
            descriptor, view, at, size = job
            try:
                done = 0
                while at + done < min(size, at + BLOCK):
                    count = os.preadv(descriptor, [view[done:]], at + done)
                    if not count:
                        raise OSError("a file became shorter")
                    done += count
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor in descriptors:
        os.close(descriptor)
    if failed:
        raise failed[0]
    return Held(None, ranges, keep=memories)


def _pinned_copy(model: Path, device: str) -> Callable[[], Held]:
    """As many bytes as the model has from pinned memory, two buffers in turn: the most a copy can reach."""
    import torch

    _wake(device)
    size = sum(path.stat().st_size for path in shards(model))
    piece = 64 << 20
    buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    slab = torch.empty(size, dtype=torch.uint8, device=device)
    slab.zero_()
    torch.cuda.synchronize(device)

    def work() -> Held:
        for number, at in enumerate(range(0, size, piece)):
            length = min(piece, size - at)
            slab[at : at + length].copy_(buffers[number % 2][:length], non_blocking=True)
        torch.cuda.synchronize(device)
        return Held(None, keep=slab)

    return work


LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        Loader("headrace", _headrace("auto")),
        Loader("headrace-mapped", _headrace("mapped")),
        Loader("headrace-buffered", _headrace("buffered")),
        Loader("headrace-direct", _headrace("direct")),
        Loader(
            "headrace-verify",
            _simple(_headrace_verified),
            ("torch", "headrace.cache.reading", "headrace.cache.store", "headrace.cache.digest"),
        ),
        Loader("load_file", _simple(_load_file), ("safetensors.torch",)),
        Loader("safe_open+clone", _simple(_safe_open_clone), ("safetensors.torch",)),
        Loader("runai", _simple(_runai), ("runai_model_streamer",)),
        Loader(
            "runai-buffered",
            _simple(_runai),
            ("runai_model_streamer",),
            {"RUNAI_STREAMER_FS_STRATEGY": "io_uring_buffered,sync_buffered"},
        ),
        Loader("fastsafetensors", _simple(_fastsafetensors), ("fastsafetensors",)),
        Loader("instanttensor", _simple(_instanttensor), ("instanttensor",), needs_cuda=True),
        Loader("raw O_DIRECT", _raw(os.O_DIRECT), raw=True),
        Loader("raw read(2)", _raw(0), raw=True),
        Loader("pinned copy", _pinned_copy, raw=True, needs_cuda=True),
    )
}
