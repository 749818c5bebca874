"""A memory cgroup for a process: version 1 or 2, whichever this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


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
    folder = base / f"headrace-bench-{os.getpid()}"
    folder.mkdir()
    try:
        knob = folder / "memory.limit_in_bytes"
        (knob if knob.exists() else folder / "memory.max").write_text(str(limit))
        yield MemoryGroup(folder)
    finally:
        folder.rmdir()


def _base() -> Path | None:
    if (_V1 / "memory.limit_in_bytes").exists():
        return _V1
    if (_V2 / "cgroup.controllers").exists() and "memory" in (_V2 / "cgroup.controllers").read_text():
        return _V2
    return None
