"""A `Device` on the host whose copies really happen later, in a thread of their own.

A loader that uses a staging buffer again before its copies are done, or hands out tensors before they are,
gets wrong bytes here as it would on a device.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref

import torch

from headrace.cache.errors import LoadError


class HostEvent:
    def __init__(self) -> None:
        self._done = threading.Event()

    def set(self) -> None:
        self._done.set()

    def wait(self) -> None:
        if not self._done.wait(30):
            raise TimeoutError("a copy never ended")


class HostDevice:
    """`room`: bytes it can hold. `delay`: seconds by which each copy lags."""

    def __init__(self, room: int = 1 << 30, delay: float = 0.0) -> None:
        self.name = "host double"
        self.torch_device = torch.device("cpu")
        self.room = room
        self.buffers = 0
        self.live_buffers = 0  # not yet dropped by who asked for them
        self.copies = 0
        self.slab_bytes = 0
        self._delay = delay
        self._lock = threading.Lock()
        self._tasks: queue.Queue[tuple[torch.Tensor, torch.Tensor] | HostEvent | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if isinstance(task, HostEvent):
                task.set()
                continue
            time.sleep(self._delay)
            task[0].copy_(task[1])
            self.copies += 1
            del task  # it must not keep the slab

    def allocate(self, size: int) -> torch.Tensor:
        with self._lock:
            if self.slab_bytes + size > self.room:
                raise LoadError(f"{self.name} has no room for {size} bytes more of tensors: free some")
            self.slab_bytes += size
        memory = torch.full((size + 256,), 0xEE, dtype=torch.uint8)
        skip = -memory.data_ptr() % 256
        weakref.finalize(memory.untyped_storage(), self._freed, size)
        return memory[skip : skip + size]

    def _freed(self, size: int) -> None:
        self.slab_bytes -= size

    def staging(self, size: int) -> torch.Tensor:
        self.buffers += 1
        self.live_buffers += 1
        memory = torch.empty(size, dtype=torch.uint8)
        weakref.finalize(memory.untyped_storage(), self._dropped)
        return memory

    def _dropped(self) -> None:
        self.live_buffers -= 1

    def copy_in(self, slab: torch.Tensor, offset: int, host: torch.Tensor) -> None:
        self._tasks.put((slab[offset : offset + host.numel()], host))

    def record(self) -> HostEvent:
        event = HostEvent()
        self._tasks.put(event)
        return event

    def synchronize(self) -> None:
        self.record().wait()

    def __enter__(self) -> HostDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self._tasks.put(None)
        self._thread.join()
