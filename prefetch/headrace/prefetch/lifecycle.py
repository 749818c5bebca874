"""From start to end: one agent per store, and what systemd is told of it.

`<root>/agent` is locked by the agent that works on the store; a newer one waits until the older one has
left. The lock is the kernel's and dies with its holder, so that a killed agent keeps nobody out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from pathlib import Path

from headrace.cache import disk, locks
from headrace.cache.errors import Held

_LOOK = 0.1

log = logging.getLogger(__name__)


class StoreLock:
    """The right to be a store's agent; `release` it, or end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    async def take(cls, root: Path, patience: float) -> StoreLock:
        """Take it, waiting at most `patience` seconds for another agent.

        Raises:
            Held: another agent keeps it; says which.
        """
        with disk.translate(root, "locking the store for an agent"):
            fd = os.open(root / "agent", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        try:
            said = False
            while not locks.try_flock(fd, exclusive=True):
                if not said:
                    said = True
                    log.info("waiting for %s to leave the store %s", _holder(fd), root)
                    notify(f"STATUS=waiting for {_holder(fd)} to leave the store")
                if time.monotonic() >= deadline:
                    raise Held(
                        f"{_holder(fd)} works on the store {str(root)!r} and did not leave it within "
                        f"{patience:.0f} s: stop it, or give this one another store."
                    )
                await asyncio.sleep(_LOOK)
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _holder(fd: int) -> str:
    try:
        return f"the agent with process id {json.loads(os.pread(fd, 100, 0))['pid']}"
    except (ValueError, KeyError, TypeError):
        return "another agent"


def notify(*state: str) -> None:
    """Tell systemd (sd_notify(3)), where it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(state).encode(), address)
        except OSError as error:
            log.warning("systemd cannot be told: %s", error)


def notify_reloading() -> None:
    """A reload begins; `notify("READY=1")` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
