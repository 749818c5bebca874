"""A value that is found out once per cluster: one node asks, the others wait for what it finds.

The right to ask is a lease that its owner renews. A node that dies while it asks blocks the others for at most
one lease; one whose question fails gives the right to the next. Where the notes cannot be reached each node asks for
itself.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from headrace.cache.errors import TrackerUnavailable

FIRST_WAIT = 0.02
LONGEST_WAIT = 0.5
"""Seconds between two looks for another node's answer."""


class Notes(Protocol):
    """Where values and the right to find them out are kept."""

    async def remember(self, key: str, value: bytes, seconds: float) -> None: ...

    async def recall_aged(self, key: str) -> tuple[bytes, float] | None:
        """The value, and how many seconds ago it was remembered. Raises TrackerUnavailable."""
        ...

    async def lock(self, key: str, token: str, seconds: float) -> bool:
        """Take the right, or keep it: False when another token has it. Raises TrackerUnavailable."""
        ...

    async def unlock(self, key: str, token: str) -> None:
        """Raises TrackerUnavailable."""
        ...


async def once(
    notes: Notes, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]], *, lease: float
) -> bytes:
    """See `Tracker.once`.

    Args:
        lease: seconds after which the right of a node that died goes to another.
    """
    begun = time.monotonic()
    token = secrets.token_hex(8)
    try:
        found = await _wait(notes, key, max_age, begun, token, lease)
    except TrackerUnavailable:
        return await ask()
    if found is not None:
        return found
    async with _kept(notes, key, token, lease):
        value = await ask()
        await notes.remember(key, value, max(max_age, lease))
        return value


async def _wait(
    notes: Notes, key: str, max_age: float, begun: float, token: str, lease: float
) -> bytes | None:
    """A value that is young enough, or None together with the right to ask."""
    wait = FIRST_WAIT
    mine = False
    while True:
        found = await notes.recall_aged(key)
        if found is not None and found[1] <= max(max_age, time.monotonic() - begun):
            if mine:
                await notes.unlock(key, token)
            return found[0]
        if mine:
            return None
        # Another node may have found it between our look and our lock: look once more with the right in hand.
        mine = await notes.lock(key, token, lease)
        if not mine:
            await asyncio.sleep(wait * (0.5 + random.random()))
            wait = min(wait * 2, LONGEST_WAIT)


@asynccontextmanager
async def _kept(notes: Notes, key: str, token: str, lease: float) -> AsyncIterator[None]:
    """The right, renewed in here and given back at the end."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(lease / 3)
            with suppress(TrackerUnavailable):
                await notes.lock(key, token, lease)

    renewal = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewal.cancel()
        await asyncio.gather(renewal, return_exceptions=True)
        with suppress(TrackerUnavailable):
            await notes.unlock(key, token)
