"""CUDA behind `Device`: pinned buffers, and one stream of its own for the copies."""

from __future__ import annotations

import torch

from headrace.cache.errors import LoadError, UsageError


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class CudaDevice:
    """One CUDA device.

    Raises:
        UsageError: there is no such device here.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                f"{device} is not available: torch {torch.__version__} finds no CUDA device here"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"{device} does not exist: this machine has {torch.cuda.device_count()}")
        self.torch_device = torch.device("cuda", index)
        self.name = str(self.torch_device)
        self._stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> torch.Tensor:
        try:
            slab = torch.empty(size, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise LoadError(f"{self.name} has no room for {size} bytes more of tensors: free some") from error
        # The allocator may hand out memory that the current stream has yet to finish with.
        self._stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        return slab

    def staging(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise LoadError(f"no pinned host memory for {size} bytes: raise the memlock limit") from error

    def copy_in(self, slab: torch.Tensor, offset: int, host: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            slab[offset : offset + host.numel()].copy_(host, non_blocking=True)

    def record(self) -> _CudaEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaEvent(event)

    def synchronize(self) -> None:
        self._stream.synchronize()
