"""A value that is found out once per cluster: one node asks, the others wait for what it finds.

The right to ask is a lease that its owner renews. A node that dies while it asks blocks the others for at most
one lease; one whose question fails gives the right to the next.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

FIRST_WAIT = 0.02
LONGEST_WAIT = 0.5
"""Seconds between two looks for another node's answer."""


class Notes(Protocol):
    """Where values and the right to find them out are kept."""

    async def remember(self, key: str, value: bytes, seconds: float) -> None: ...

    async def recall_aged(self, key: str) -> tuple[bytes, float] | None:
        """The value, and how many seconds ago it was remembered."""
        ...

    async def lock(self, key: str, token: str, seconds: float) -> bool:
        """Take the right, or keep it: False when another token has it."""
        ...

    async def unlock(self, key: str, token: str) -> None: ...


async def once(
    notes: Notes, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]], *, lease: float
) -> bytes:
    """See `Tracker.once`.

    Args:
        lease: seconds after which the right of a node that died goes to another.
    """
    begun = time.monotonic()
    token = secrets.token_hex(8)
    wait = FIRST_WAIT
    while True:
        found = await notes.recall_aged(key)
        if found is not None and found[1] <= max(max_age, time.monotonic() - begun):
            return found[0]
        if await notes.lock(key, token, lease):
            break
        await asyncio.sleep(wait * (0.5 + random.random()))
        wait = min(wait * 2, LONGEST_WAIT)
    renewal = asyncio.create_task(_renew(notes, key, token, lease))
    try:
        # Another node may have found it between our look and our lock.
        found = await notes.recall_aged(key)
        if found is not None and found[1] <= max(max_age, time.monotonic() - begun):
            return found[0]
        value = await ask()
        await notes.remember(key, value, max(max_age, lease))
        return value
    finally:
        renewal.cancel()
        with suppress(asyncio.CancelledError):
            await renewal
        await notes.unlock(key, token)


async def _renew(notes: Notes, key: str, token: str, lease: float) -> None:
    while True:
        await asyncio.sleep(lease / 3)
        await notes.lock(key, token, lease)
