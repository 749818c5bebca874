"""What the page cache holds of a file, and what was read past it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from headrace.loader.memory import resident

_MADV_POPULATE_READ = 22  # Linux 5.14


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


@contextmanager
def kept(*files: Path) -> Iterator[None]:
    """Bring files into the page cache and map them for as long: a machine that gives memory back to its host may
    drop clean pages that nobody maps within seconds."""
    with ExitStack() as mappings:
        for path in files:
            with path.open("rb") as file:
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                mappings.enter_context(mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))
        yield


def keep_code() -> None:
    """Bring in all of the libraries that this process has mapped. They stay then for its children, which would
    otherwise read from a disk the parts that they are the first to run."""
    madvise = ctypes.CDLL(None).madvise
    with open("/proc/self/maps") as maps:
        for line in maps:
            words = line.split()
            if len(words) > 5 and ".so" in words[5] and words[1].startswith("r"):
                start, stop = (int(end, 16) for end in words[0].split("-"))
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_POPULATE_READ)
