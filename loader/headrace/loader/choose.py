"""Which read path, and why in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from headrace.cache.errors import UsageError
from headrace.loader.memory import resident
from headrace.loader.plan import FilePlan
from headrace.loader.readers.buffered import BufferedReader
from headrace.loader.readers.mapped import MappedReader
from headrace.loader.source import SourceFile

ReadPath = Literal["auto", "mapped", "buffered"]

WARM = 0.8
"""A file of which the page cache holds this part is mapped: copying what is already in memory costs more."""

SPARE = 0.8
"""Private memory is taken only up to this part of what is available."""


@dataclass(frozen=True, slots=True)
class Choice:
    reader: type[MappedReader] | type[BufferedReader]
    why: str


def check_read_path(read_path: str) -> None:
    """Raises: UsageError: no such read path."""
    if read_path not in get_args(ReadPath):
        raise UsageError(f"read_path must be one of {', '.join(get_args(ReadPath))}, not {read_path!r}")


def choose(file: SourceFile, plan: FilePlan, read_path: ReadPath, total: int, free: int | None) -> Choice:
    """Choose for one file.

    Args:
        file: opened; its header is ready.
        plan: of the file.
        read_path: what the user wants; anything but "auto" decides.
        total: bytes of this load, all files together.
        free: bytes of memory that were available before it, or None where that is unknown.
    """
    if read_path == "mapped":
        return Choice(MappedReader, "mapped, as asked")
    if read_path == "buffered":
        return Choice(BufferedReader, "buffered, as asked")
    if free is not None and total > SPARE * free:
        return Choice(MappedReader, f"mapped: {total} bytes would not fit well in {free} available bytes")
    if not file.complete:
        return Choice(MappedReader, "mapped: still being staged, so its bytes are just in the page cache")
    if not plan.segments:
        return Choice(BufferedReader, "buffered: nothing to read")
    part = resident(file.fileno(), plan.segments[0].start, plan.segments[-1].stop)
    if part is None:
        return Choice(BufferedReader, "buffered: the kernel does not tell what the page cache holds")
    if part >= WARM:
        return Choice(MappedReader, f"mapped: {part:.0%} of it is in the page cache")
    return Choice(BufferedReader, f"buffered: only {part:.0%} of it is in the page cache")
