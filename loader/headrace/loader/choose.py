"""The autopilot: which read path for a file, and why in one sentence.

What the page cache holds is worth most: mapping it copies nothing. What it does not hold comes fastest from
the device directly, or, on some devices, through the page cache; see `pace`. Where a file is partly in memory,
the times of the two ways are estimated from these rates. The choice is not the last word: a file that is read
into private memory is read piece by piece as its pieces are found (`readers.adaptive`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from headrace.cache.errors import UsageError
from headrace.loader.memory import about_resident
from headrace.loader.pace import Pace
from headrace.loader.plan import FilePlan
from headrace.loader.readers.adaptive import AdaptiveFetch
from headrace.loader.readers.direct import DirectFetch, DirectRefusedError
from headrace.loader.readers.fetch import BufferedFetch, Fetch
from headrace.loader.readers.mapped import MappedReader
from headrace.loader.readers.private import PrivateReader
from headrace.loader.readers.reader import FileReader
from headrace.loader.source import SourceFile

ReadPath = Literal["auto", "mapped", "buffered", "direct"]

SPARE = 0.8
"""Private memory is taken only up to this part of what is available."""

_WARM = 0.3
"""A file of which the page cache holds less is mapped only where that was seen to be clearly faster than reading
the device: what is read once need not go through the page cache."""

_CLEARLY = 1.1

_COLD = 0.1  # a file of which the page cache holds no more than this is as good as only on its device

# Bytes per second, where nothing is known yet. Of the memory; of a device.
_MAPPING, _COPYING = 40e9, 12e9
_DIRECT = 2.5e9
# Into the page cache, as a part of that: of an unknown device; of one whose mapped reads are worth a try.
_CAUTIOUS, _CURIOUS = 0.6, 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """How a file is read.

    Attributes:
        why: part of a sentence.
        fetch: brings the bytes into memory of our own; None: the file is mapped.
        absent: of a mapped file, that not all of it is in the page cache: the pace of its device.
        present: of a file that is read, that all of it is in the page cache.
    """

    why: str
    fetch: Fetch | None = None
    absent: Pace | None = None
    present: bool = False

    def reader(self, file: SourceFile, plan: FilePlan) -> FileReader:
        """For tensors on the host."""
        if self.fetch is None:
            return MappedReader(file, plan, absent=self.absent)
        return PrivateReader(file, plan, self.fetch, copies=self.present)


def check_read_path(read_path: str) -> None:
    """Raises: UsageError: no such read path."""
    if read_path not in get_args(ReadPath):
        raise UsageError(f"read_path must be one of {', '.join(get_args(ReadPath))}, not {read_path!r}")


def choose(
    file: SourceFile,
    plan: FilePlan,
    read_path: ReadPath,
    *,
    pace: Callable[[], Pace],
    total: int,
    free: int | None,
    mappable: bool = True,
) -> Choice:
    """Choose for one file.

    Args:
        file: opened; its header is ready.
        plan: of the file.
        read_path: what the user wants; anything but "auto" decides.
        pace: gives that of the file's device.
        total: bytes of this load, all files together.
        free: bytes of memory that were available before it, or None where that is unknown.
        mappable: False where the bytes go on to a device, so that they have to be read.
    """
    if read_path == "mapped" and mappable:
        return Choice("as asked", absent=pace() if _is_partly_absent(file, plan) else None)
    if read_path in ("buffered", "mapped"):
        return Choice("as asked", BufferedFetch(file), present=not _is_partly_absent(file, plan))
    if read_path == "direct":
        return _direct(file, pace())
    if mappable and free is not None and total > SPARE * free:
        why = f"{total} bytes would not fit well in {free} available bytes"
        return Choice(why, absent=pace() if _is_partly_absent(file, plan) else None)
    if not file.complete:
        why = "still being staged, so its bytes are just in the page cache"
        return Choice(why) if mappable else Choice(why, BufferedFetch(file))
    if not plan.segments:
        return Choice("nothing to read", BufferedFetch(file))
    return _measured(file, plan, pace(), mappable)


def choose_shared(file: SourceFile, plan: FilePlan, read_path: ReadPath, *, mappable: bool = True) -> Choice:
    """Choose for a file that several processes load at once, each beginning somewhere else: through the page
    cache, so that it comes off its disk once."""
    why = "through the page cache, where the other ranks find it"
    if mappable and read_path in ("auto", "mapped"):
        return Choice(why, absent=Pace(1) if _is_partly_absent(file, plan) else None)
    return Choice(why, BufferedFetch(file))


def _direct(file: SourceFile, pace: Pace) -> Choice:
    try:
        return Choice("as asked", AdaptiveFetch(file, DirectFetch(file), pace, always_direct=True))
    except DirectRefusedError as refusal:
        return Choice(f"not directly as asked, because {refusal}", BufferedFetch(file))


def _measured(file: SourceFile, plan: FilePlan, pace: Pace, mappable: bool) -> Choice:
    part = _present(file, plan)
    if part is None:
        found = "the kernel does not tell what the page cache holds"
    elif part == 1.0:
        found = "all of it is in the page cache"
    else:
        found = f"{int(100 * part)} % of it is in the page cache"
    if mappable and part is not None and _mapping_is_faster(part, pace):
        return Choice(found, absent=pace if part < 1.0 else None)
    if part == 1.0:
        return Choice(found, BufferedFetch(file), present=True)
    try:
        cold = part is not None and part <= _COLD
        return Choice(found, AdaptiveFetch(file, DirectFetch(file), pace, cold=cold))
    except DirectRefusedError as refusal:
        return Choice(f"{found}, and {refusal}", BufferedFetch(file))


def _mapping_is_faster(part: float, pace: Pace) -> bool:
    """Whether it takes less time to map a file, `part` of which is in the page cache, than to read it."""
    ways = [rate for rate in (pace.rate("direct"), pace.rate("buffered")) if rate is not None]
    device = max(ways, default=_DIRECT)
    if part < _WARM:
        known = pace.rate("mapped")
        return bool(ways) and known is not None and known > _CLEARLY * device
    mapped = pace.rate("mapped") or device * (_CURIOUS if ways else _CAUTIOUS)
    absent = 1.0 - part
    reading = part / (pace.rate("copied") or _COPYING) + absent / device
    return part / _MAPPING + absent / mapped <= reading


def _present(file: SourceFile, plan: FilePlan) -> float | None:
    """The part of what will be read that the page cache holds, about."""
    if not plan.segments:
        return 1.0
    # Of selections, all that lies between is asked about too.
    return about_resident(file.fileno(), plan.segments[0].start, plan.segments[-1].stop)


def _is_partly_absent(file: SourceFile, plan: FilePlan) -> bool:
    part = _present(file, plan) if file.complete else 1.0
    return part is not None and part < 1.0
