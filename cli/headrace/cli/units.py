"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

from headrace.cache.errors import UsageError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)([bB]?)$")
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of "16MiB", "16M" (both 1024-based), "16MB" (1000-based) or "16777216".

    Raises:
        UsageError: none of these.
    """
    match = _SIZE.match(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size: use a number of bytes, or for example 16MiB or 200GB.")
    decimal = bool(match[2]) and not match[3] and bool(match[4])
    return int(float(match[1]) * (1000 if decimal else 1024) ** _POWER[match[2].lower()])


def show_size(size: float) -> str:
    """At most four digits and a 1000-based unit: "2.04 GB"."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"


def show_seconds(seconds: float) -> str:
    """ "0.42 s", "12.3 s", "3:05", "2:03:05"."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_age(seconds: float) -> str:
    """ "just now", "5 min ago", "3 h ago", "12 d ago"."""
    for limit, length, unit in ((3600, 60, "min"), (86400, 3600, "h"), (float("inf"), 86400, "d")):
        if seconds < 60:
            break
        if seconds < limit:
            return f"{int(seconds // length)} {unit} ago"
    return "just now"


def count(number: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
