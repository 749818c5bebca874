"""What the page cache holds of a file, and what was read past it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.loader.memory import resident


def drop(path: Path) -> None:
    """Empty the page cache of a file, or skip the test."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(file.fileno(), 0, path.stat().st_size) != 0:
            pytest.skip("this file system keeps its pages whatever is advised (tmpfs does)")


def device_bytes() -> int:
    """Bytes that this process has had read from block devices."""
    text = Path("/proc/self/io").read_text()
    return int(text.partition("\nread_bytes:")[2].split()[0])
