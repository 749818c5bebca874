"""Memory for file images, what the page cache holds, and how much memory there is to take.

Everything here speaks to the kernel directly: Python's own `mmap.madvise` keeps the interpreter lock, which
would stop the other reader threads for as long as pages are brought in.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import torch

from headrace.cache.errors import LoadError
from headrace.loader.plan import PAGE

_HUGE = 2 * 1024 * 1024
_MADV_POPULATE_READ = 22  # Linux 5.14
_SYS_CACHESTAT = 451  # Linux 6.5, the same number on every architecture
_SAMPLES = 16
_SAMPLE_DISTANCE = 2 * 1024 * 1024  # samples are not taken closer than this
_PARTS, _PART = 64, 512 * 1024  # of a range of which only parts are asked about
_GOLDEN = 0.618033988749895
_ASKED = 512 * 1024
"""Bytes that the kernel is asked for at once: of more it may take only as much as one request of the device."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def anonymous(size: int, what: str) -> torch.Tensor:
    """Fresh private memory, advised to use huge pages, as a uint8 tensor of `size` bytes.

    The memory is returned when the tensor and all its views are gone. It goes on to the end of its last page
    (see `whole_pages`).

    Raises:
        LoadError: there is not enough memory; `what` says in the message what it was for.
    """
    # The kernel aligns a mapping to huge pages only if its length is a multiple of them.
    unit = _HUGE if size >= _HUGE else mmap.PAGESIZE
    try:
        memory = mmap.mmap(-1, max(-(-size // unit), 1) * unit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise LoadError(
            f"not enough memory for the {size} bytes of {what}: free some, or map the file"
        ) from error
    if size >= _HUGE:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages: slower, and nothing to say
                raise LoadError(f"memory for {what} cannot be prepared: {error.strerror}") from error
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def map_file(descriptor: int, size: int, what: str) -> mmap.mmap:
    """Map a file privately and writably: writes stay in this process, and torch wants writable buffers.

    Raises:
        LoadError: the file is shorter than `size`, or cannot be mapped.
    """
    try:
        return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except ValueError as error:
        raise LoadError(f"{what} is shorter than its {size} bytes: stage or download it again") from error
    except OSError as error:
        raise LoadError(
            f"{what} cannot be mapped: {error.strerror or error}; try read_path='buffered'"
        ) from error


def populate(image: torch.Tensor, start: int, stop: int, what: str) -> None:
    """Bring bytes [start, stop) of a mapped file in, rounded outward to pages.

    Where touching the memory would kill the process (the file became shorter, the disk failed), this raises.

    Raises:
        LoadError: the pages cannot be brought in.
    """
    page = mmap.PAGESIZE
    begin = start // page * page
    if stop <= start:
        return
    while _libc.madvise(image.data_ptr() + begin, stop - begin, _MADV_POPULATE_READ) != 0:
        number = ctypes.get_errno()
        if number in (errno.EINTR, errno.EAGAIN):
            continue
        if number == errno.EINVAL:
            raise LoadError(
                f"{what} cannot be loaded as mapped memory on this kernel: use read_path='buffered'"
            )
        if number == errno.ENOMEM:
            raise LoadError(f"not enough memory to map bytes {start}-{stop} of {what}: free some")
        raise LoadError(
            f"{what} became shorter, or its disk failed, while bytes {start}-{stop} were loaded "
            f"({os.strerror(number)}): stage or download it again"
        )


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recent"))


def resident(descriptor: int, start: int, stop: int) -> float | None:
    """The part of [start, stop) of a file that the page cache holds, 0 to 1; None where nobody can tell.

    Exact where this process may write the file or owns it. To others the kernel refuses cachestat(2), and to
    mincore(2) it answers that everything is there; for them a few samples must do.
    """
    if stop <= start:
        return 1.0
    part = _resident_by_cachestat(descriptor, start, stop)
    if part is not None:
        return part
    if ctypes.get_errno() == errno.ENOSYS and _is_trusted(descriptor):
        page = mmap.PAGESIZE
        return _resident_by_mincore(descriptor, start // page * page, (stop - 1) // page - start // page + 1)
    return _resident_by_samples(descriptor, start, stop)


def about_resident(descriptor: int, start: int, stop: int) -> float | None:
    """As `resident`, but of a long range only some parts are asked about: for each GB that lies in small folios the
    kernel would take 4 ms to answer."""
    if stop - start <= _PARTS * _PART:
        return resident(descriptor, start, stop)
    stretch = (stop - start) / _PARTS
    found = 0.0
    for number in range(_PARTS):
        # Somewhere else in each stretch: what is there may repeat itself, too.
        begin = start + int(number * stretch + number * _GOLDEN % 1 * (stretch - _PART))
        part = _resident_by_cachestat(descriptor, begin, begin + _PART)
        if part is None:
            return resident(descriptor, start, stop)
        found += part
    return found / _PARTS


def ask_for(descriptor: int, start: int, stop: int) -> None:
    """Have the kernel begin to read what the page cache lacks of [start, stop) of a file: in large pieces, where reads
    or page faults would bring in a few pages at a time. Advice: it may not be taken."""
    for begin in range(start, stop, _ASKED):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, begin, min(_ASKED, stop - begin), os.POSIX_FADV_WILLNEED)


def _resident_by_cachestat(descriptor: int, start: int, stop: int) -> float | None:
    page = mmap.PAGESIZE
    wanted, found = _Range(start, stop - start), _Cachestat()
    answer = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_uint(descriptor),
        ctypes.byref(wanted),
        ctypes.byref(found),
        ctypes.c_uint(0),
    )
    if answer != 0:
        return None
    return min(1.0, float(found.cache) / ((stop - 1) // page - start // page + 1))


def _is_trusted(descriptor: int) -> bool:
    return os.geteuid() in (0, os.fstat(descriptor).st_uid)


def _resident_by_samples(descriptor: int, start: int, stop: int) -> float | None:
    """Of some bytes, spread over the range, those that can be read without waiting. Each that cannot makes
    the kernel read a page or a few of them: so few samples."""
    count = min(_SAMPLES, -(-(stop - start) // _SAMPLE_DISTANCE))
    byte = bytearray(1)
    present = 0
    for number in range(count):
        try:
            offset = start + (2 * number + 1) * (stop - start) // (2 * count)
            present += os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:  # not on this file system
            return None
    return present / count


def _resident_by_mincore(descriptor: int, start: int, pages: int) -> float | None:
    length = pages * mmap.PAGESIZE
    try:
        with mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE, offset=start) as mapping:
            anchor = ctypes.c_char.from_buffer(mapping)
            answers = (ctypes.c_ubyte * pages)()
            failed = _libc.mincore(
                ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(length), ctypes.byref(answers)
            )
            del anchor
    except (OSError, ValueError):
        return None
    return None if failed else sum(answer & 1 for answer in bytes(answers)) / pages


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def available() -> int | None:
    """Bytes that can be allocated before something must give: the machine's and this control group's limit,
    whichever is less; None where neither is known."""
    return min((amount for amount in (_machine(), _control_group()) if amount is not None), default=None)


def _machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group() -> int | None:
    """The least that any group from ours upward has left (version 2; file pages count as free)."""
    group = next((line.strip()[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), None)
    least: int | None = None
    while group is not None:
        base = "/sys/fs/cgroup" + group.rstrip("/")
        limit = next(_lines(base + "/memory.max"), "max").strip()
        if limit.isdigit():
            used = int(next(_lines(base + "/memory.current"), "0"))
            statistics = dict(line.split() for line in _lines(base + "/memory.stat"))
            used -= int(statistics.get("active_file", 0)) + int(statistics.get("inactive_file", 0))
            left = int(limit) - used
            least = left if least is None else min(least, left)
        group = group.rsplit("/", 1)[0] if group.rstrip("/") else None
    return least


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path) as file:
            yield from file
    except OSError:  # not there, or hidden from this container: then it says nothing
        return


def whole_pages(image: torch.Tensor, begin: int, end: int) -> memoryview:
    """Bytes [begin, end) of an image made by `anonymous`, with the rest of the first and the last page. It
    keeps the image."""
    first, last = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
    array = (ctypes.c_ubyte * (last - first)).from_address(image.data_ptr() + first)
    array.owner = image  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional uint8 tensor on the host, writable. It keeps the tensor."""
    if not tensor.numel():
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
