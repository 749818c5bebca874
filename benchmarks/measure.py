"""Measuring in pairs: costs of a process tree, the machine, medians and bootstrap intervals."""

from __future__ import annotations

import os
import platform
import random
import resource
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of wall time and of CPU (of this process and its ended children), of which in user space.

    The kernel's share moves the same bytes for every client, and is where a virtual machine's host bills
    the first touch of memory; the user share is steadier.
    """

    wall: float
    cpu: float
    user: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu, self.user - other.user)


def now() -> Cost:
    """This moment; subtract an earlier one."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    user = sum(u.ru_utime for u in used)
    return Cost(time.monotonic(), user + sum(u.ru_stime for u in used), user)


def end_cleanly() -> None:
    """Let SIGTERM unwind the stack, so that servers end and folders go."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def tree_cpu(pid: int) -> float:
    """CPU seconds that a process and its living descendants have used."""
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICK
    total, pending = 0.0, [pid]
    while pending:
        one = pending.pop()
        total += used.get(one, 0.0)
        pending += parents.get(one, [])
    return total


def pretouch(folder: Path, size: int) -> None:
    """Use `size` bytes of page cache once, and give them back to the kernel's free lists.

    A host that takes free memory back bills whoever touches it next: writing a fresh file then costs 1 to
    2 CPU s/GB, against 0.2 right after this. Anonymous memory would not do: large blocks come from other lists.
    """
    block = bytes(16 << 20)
    path = folder / "pretouch"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for offset in range(0, size, len(block)):
            os.pwrite(fd, block, offset)
    finally:
        os.close(fd)
        path.unlink()


def redis_cpu(client: Any) -> float:
    """Seconds of CPU of a Redis server so far, all of its process."""
    info = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def machine(*folders: str | os.PathLike[str]) -> str:
    """One line per fact that a figure depends on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    lines = [
        f"machine: {len(os.sched_getaffinity(0))} CPUs ({model}), {memory:.0f} GiB memory",
        f"kernel {platform.release()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}",
    ]
    for folder in folders:
        stats = os.statvfs(folder)
        lines.append(f"disk of {os.fspath(folder)}: {stats.f_bavail * stats.f_frsize / GB:.0f} GB free")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with its 95 % bootstrap interval, of `count` values."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float | int]:
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.count}


def interval(values: Sequence[float], *, rounds: int = 4000, seed: int = 1) -> Interval:
    """The median of `values`, and where the medians of resampled values lie."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return Interval(
        statistics.median(values), medians[int(0.025 * rounds)], medians[int(0.975 * rounds)], len(values)
    )
