"""Cgroups that limit memory, or reading from a device: version 1 or 2, whichever this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_IO_V1 = Path("/sys/fs/cgroup/blkio")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A cgroup with a limit."""

    folder: Path

    def command(self, command: Sequence[str]) -> list[str]:
        """A command line that joins the group before it becomes `command`."""
        return [
            "sh",
            "-c",
            'echo $$ > "$1" && shift && exec "$@"',
            "sh",
            str(self.folder / "cgroup.procs"),
            *command,
        ]

    def peak(self) -> int:
        """The most bytes it has used, page cache included."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return 0


def available() -> bool:
    """Whether this user can make a memory cgroup here."""
    base = _base()
    return base is not None and os.access(base, os.W_OK)


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group that may use `limit` bytes, page cache included; removed afterwards.

    Raises:
        OSError: not allowed, or no memory controller.
    """
    base = _base()
    if base is None:
        raise OSError("this machine has no memory controller")
    with _made(base / f"headrace-bench-{os.getpid()}") as folder:
        knob = folder / "memory.limit_in_bytes"
        (knob if knob.exists() else folder / "memory.max").write_text(str(limit))
        yield MemoryGroup(folder)


def _base() -> Path | None:
    if (_V1 / "memory.limit_in_bytes").exists():
        return _V1
    if (_V2 / "cgroup.controllers").exists() and "memory" in (_V2 / "cgroup.controllers").read_text():
        return _V2
    return None


def io_throttling() -> bool:
    """Whether this user can make a cgroup that throttles a block device here."""
    base = _io_base()
    return base is not None and os.access(base, os.W_OK)


@contextmanager
def io_group(device: int, bytes_per_second: int) -> Iterator[Path]:
    """A group whose processes read at most that much from a block device (`st_dev` of a file on it); gives
    its folder, and is removed afterwards.

    Raises:
        OSError: not allowed, or no such controller.
    """
    base = _io_base()
    if base is None:
        raise OSError("this machine has no controller for block devices")
    with _made(base / f"headrace-bench-io-{os.getpid()}") as folder:
        number = f"{os.major(device)}:{os.minor(device)}"
        first = folder / "blkio.throttle.read_bps_device"
        if first.exists():
            first.write_text(f"{number} {bytes_per_second}")
        else:
            (folder / "io.max").write_text(f"{number} rbps={bytes_per_second}")
        yield folder


def _io_base() -> Path | None:
    if (_IO_V1 / "blkio.throttle.read_bps_device").exists():
        return _IO_V1
    control = _V2 / "cgroup.subtree_control"
    return _V2 if control.exists() and "io" in control.read_text().split() else None


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()
