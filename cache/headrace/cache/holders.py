"""Which processes have an inode open or mapped: who still reads old bytes after a repair.

Found in /proc (proc(5): `fd`, `maps`), so only as far as this user may look into other processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, the name of its program, and whether it has the file "mapped" or "open"."""

    pid: int
    command: str
    how: str


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds an inode; `hidden` processes of other users could not be looked into."""

    found: tuple[Holder, ...]
    hidden: int


def holders_of(device: int, inode: int) -> Holders:
    """Every visible process that has the inode (st_dev, st_ino) mapped or open."""
    found: list[Holder] = []
    hidden = 0
    for entry in sorted((e for e in _PROC.iterdir() if e.name.isdigit()), key=lambda e: int(e.name)):
        try:
            how = _how(entry, device, inode)
        except PermissionError:
            hidden += 1
            continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        if how is not None:
            found.append(Holder(int(entry.name), _command(entry), how))
    return Holders(tuple(found), hidden)


def _how(process: Path, device: int, inode: int) -> str | None:
    if any(pair == (device, inode) for pair in _mapped(process)):
        return "mapped"
    with os.scandir(process / "fd") as descriptors:
        for descriptor in descriptors:
            try:
                status = os.stat(descriptor.path)
            except OSError:
                # Closed meanwhile, or a kind of descriptor that cannot be looked at.
                continue
            if (status.st_dev, status.st_ino) == (device, inode):
                return "open"
    return None


def _mapped(process: Path) -> Iterator[tuple[int, int]]:
    # address perms offset major:minor inode path; the kernel's threads have no lines.
    for line in (process / "maps").read_bytes().splitlines():
        fields = line.split(None, 5)
        if fields[4] != b"0":
            major, _, minor = fields[3].partition(b":")
            yield os.makedev(int(major, 16), int(minor, 16)), int(fields[4])


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "?"
