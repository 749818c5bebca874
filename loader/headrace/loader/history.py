"""What earlier loads learned of this machine's devices: a small file in the user's cache folder.

One JSON object: device -> bytes per second of each kind (see `pace`), and when. It only saves the
next load a try: a file that is missing, damaged or cannot be written changes nothing, and is replaced at the
next chance. It is written whole beside its place and renamed, so two loads that end at once lose at most the
rates of one; the oldest devices are forgotten.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from headrace.loader.pace import Kind

DEVICES = 32
"""Devices that are remembered."""

_LONGEST = 64 * 1024  # bytes of a file that is worth reading
_AGE = 30 * 86400.0  # seconds after which a rate is not believed any more

_log = logging.getLogger(__name__)


def location() -> Path | None:
    """`read-paths.json` in the user's cache folder; None where there is none."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = os.fspath(Path.home() / ".cache")
        except RuntimeError:  # a user without a home
            return None
    return Path(base) / "headrace" / "read-paths.json"


def device_key(status: os.stat_result) -> str:
    """Names the device of a file, as long as it stays what it is: number and kind of file system."""
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return f"{number} {_kinds().get(number, 'unknown')}"


def recall(path: Path | None, key: str) -> dict[Kind, float]:
    """The rates that are remembered of a device; empty where nothing is."""
    entry = _read(path).get(key)
    if entry is None or not 0 <= time.time() - entry["time"] <= _AGE:
        return {}
    return {kind: entry[kind] for kind in get_args(Kind) if kind in entry}


def remember(path: Path | None, key: str, rates: dict[Kind, float]) -> bool:
    """Keep the rates of a device; whether that worked."""
    if path is None or not rates:
        return False
    entries = _read(path)
    entries[key] = {
        **entries.get(key, {}),
        **{str(kind): rate for kind, rate in rates.items()},
        "time": time.time(),
    }
    newest = sorted(entries, key=lambda one: entries[one]["time"], reverse=True)[:DEVICES]
    text = json.dumps({one: entries[one] for one in newest}, indent=1)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        _log.debug("rates of %s are not remembered: %s", key, error)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return False
    return True


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """The entries that make sense."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_LONGEST))
    except (OSError, ValueError, RecursionError) as error:
        _log.debug("%s is not used: %s", path, error)
        return {}
    if not isinstance(value, dict):
        return {}
    return {key: entry for key, entry in value.items() if _sensible(entry)}


def _sensible(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and "time" in entry
        and all(
            isinstance(number, int | float) and math.isfinite(number) and number > 0
            for number in entry.values()
        )
    )


def _kinds() -> dict[str, str]:
    """Device number -> kind of file system, of what is mounted here (proc_pid_mountinfo(5))."""
    kinds: dict[str, str] = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                kinds[before.split()[2]] = after.split()[0]
    except OSError as error:
        _log.debug("mounts are not known: %s", error)
    return kinds
