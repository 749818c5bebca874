"""One repetition of one loader: in a process forked from one that has imported everything.

What is measured ends when the tensors are resident: a byte of every 4 KiB page was touched, whoever loaded
them. Beside the time: CPU, page faults, the bytes that this process read from block devices, and how much
memory it took at its peak beyond the tensors themselves.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Cost, now

PAGE = 4096
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
_RESERVED = 256 << 20  # mappings longer than this are reserved, not used


@dataclass(frozen=True, slots=True)
class Held:
    """What a loader brought; it lives until the measurement ends.

    Attributes:
        tensors: by name; None for a raw read, which only has memory.
        ranges: (address, bytes) on the host, of a raw read.
        notes: what the loader says of itself.
    """

    tensors: dict[str, Any] | None = None
    ranges: Sequence[tuple[int, int]] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    keep: object = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One repetition.

    Attributes:
        cost: until every page was touched.
        returned: seconds until the loader returned.
        device_bytes: read from block devices by this process.
        faults: page faults that needed no disk.
        beyond: bytes of host memory at the peak, beyond the tensors (on the host) and what was there before.
        private: bytes of host memory at the peak that were not pages of files.
        notes: what the loader says of itself.
        digest: of the tensors, where it was asked for.
    """

    cost: Cost
    returned: float
    device_bytes: int
    faults: int
    beyond: int
    private: int
    notes: dict[str, Any]
    digest: str | None


class Failed(Exception):
    """The loader could not do it; the text says why, in a line."""


def repeat(
    prepare: Callable[[], Callable[[], Held]],
    *,
    room: int,
    destination: int,
    files: Sequence[Path],
    environ: dict[str, str],
    group: Path | None = None,
    digest: Callable[[dict[str, Any]], str] | None = None,
) -> Outcome:
    """Fork, measure, and return what the child found.

    Args:
        prepare: called in the child before the clock starts; gives what is measured.
        room: bytes of host memory that it will take, about: see `pretouch`.
        destination: bytes of host memory that the tensors need.
        files: of the model: mappings of these are not counted as a library's.
        environ: for the child.
        group: a cgroup that the child joins.
        digest: called in the child with the tensors after the clock stopped.

    Raises:
        Failed: the loader raised.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(writer, said.fileno(), prepare, room, destination, files, environ, group, digest)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        if not answer:
            said.seek(0)
            tail = said.read()[-500:].decode(errors="replace")
            raise Failed(f"ended with status {status}: {tail}")
    values = json.loads(answer)
    if "failed" in values:
        raise Failed(values["failed"])
    return Outcome(**{**values, "cost": Cost(**values["cost"])})


def _child(
    writer: int,
    said: int,
    prepare: Callable[[], Callable[[], Held]],
    room: int,
    destination: int,
    files: Sequence[Path],
    environ: dict[str, str],
    group: Path | None,
    digest: Callable[[dict[str, Any]], str] | None,
) -> None:
    """Never returns."""
    try:
        os.dup2(said, 1)  # loaders talk
        os.dup2(said, 2)
        os.environ.update(environ)
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        answer = asdict(_measure(prepare, room, destination, files, digest))
    except BaseException as error:  # noqa: BLE001 - handed to the parent, which raises it
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    # Threads and device contexts of loaders are not waited for.
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)


def _measure(
    prepare: Callable[[], Callable[[], Held]],
    room: int,
    destination: int,
    files: Sequence[Path],
    digest: Callable[[dict[str, Any]], str] | None,
) -> Outcome:
    work = prepare()
    own_memory()
    libraries = _library_pages(files)
    pretouch(int(room * 1.1))  # as late as can be: hosts are quick to take free memory back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, read, faults = _memory("VmRSS"), _device_bytes(), _faults()
    mapped = _memory("RssFile")
    start = now()
    held = work()
    returned = time.monotonic() - start.wall
    if held.tensors is None:
        touch(held.ranges)
    else:
        touch(ranges_of(held.tensors.values()))
    cost = now() - start
    peak = _memory("VmHWM")
    return Outcome(
        cost,
        returned,
        _device_bytes() - read,
        _faults() - faults,
        peak - before - destination - (_library_pages(files) - libraries),
        max(0, peak - before - (_memory("RssFile") - mapped)),
        held.notes,
        digest(held.tensors) if digest is not None and held.tensors is not None else None,
    )


def ranges_of(tensors: Iterable[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of host memory that holds these tensors; neighbours are one."""
    found: list[tuple[int, int]] = []
    for start, length in sorted((t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"):
        if not length:
            continue
        if found and start <= sum(found[-1]) + PAGE:
            first, so_far = found[-1]
            found[-1] = (first, max(so_far, start + length - first))
        else:
            found.append((start, length))
    return found


def touch(ranges: Iterable[tuple[int, int]]) -> int:
    """Read one byte of every page; the result has no meaning but that it had to be read."""
    import numpy

    total = 0
    for start, length in ranges:
        array = (ctypes.c_ubyte * length).from_address(start)
        memory = numpy.frombuffer(memoryview(array).cast("B"), numpy.uint8)
        total ^= int(numpy.bitwise_xor.reduce(memory[::PAGE])) ^ int(memory[-1])
    return total


def pretouch(size: int) -> None:
    """Use `size` bytes of huge pages once and give them back: see README.md, "Touched memory"."""
    if not size:
        return
    size = min(size, int(_meminfo("MemAvailable") * 0.7))
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)
        del start


def own_memory() -> None:
    """Have the pages of this process that a fork left shared or unmapped: a loader is called in a process that has
    them, so copying them one by one, at their first use, is not what is measured."""
    madvise = ctypes.CDLL(None).madvise
    with open("/proc/self/maps") as maps:
        for line in maps.readlines():
            words = line.split()
            start, stop = (int(end, 16) for end in words[0].split("-"))
            writable, library = words[1] == "rw-p", len(words) > 5 and ".so" in words[5]
            if library or (writable and stop - start <= _RESERVED):
                advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)  # refused: as before


def _device_bytes() -> int:
    return _field("/proc/self/io", "read_bytes")


def _memory(name: str) -> int:
    return _field("/proc/self/status", name) * 1024


def _meminfo(name: str) -> int:
    return _field("/proc/meminfo", name) * 1024


def _field(path: str, name: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def _faults() -> int:
    return sum(resource.getrusage(who).ru_minflt for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _library_pages(files: Sequence[Path]) -> int:
    """Resident bytes of mapped files other than the model's: code, which is not a loader's memory."""
    own = {os.fspath(path.resolve()) for path in files}
    total, counted = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                name = line.split(None, 5)[5].strip() if len(words) > 5 else ""
                counted = name.startswith("/") and name not in own and ".so" in name
            elif counted and words[0] == "Rss:":
                total += int(words[1]) * 1024
    return total
