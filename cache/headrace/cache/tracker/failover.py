"""Redis while it answers, else the nodes among themselves, and back again.

A call that Redis does not answer is tried once more and then answered without it; from then on nothing waits for
Redis until a task in the background has found it again. What this node gained and lost meanwhile is said then.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from headrace.cache.errors import TrackerUnavailable
from headrace.cache.tracker.protocol import Answer, Exchange, Peer, Swarm, Tracker
from headrace.cache.tracker.without import PeerTracker

PAUSE = 0.1
"""Seconds before a call is tried again."""
SLOW = 0.5
"""Seconds after which a call that failed is not tried again: others would wait for as long again."""
PROBE = 2.0
LONGEST_PROBE = 60.0
"""Seconds between two looks whether Redis is there again: longer and longer while it comes only to go."""
STEADY = 60.0
"""Seconds for which it has to be there to count as steady."""
MEMBERS = 15.0
"""Seconds for which the list of members, as it would be needed without Redis, is not asked for again."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Unsaid:
    """What Redis has not heard of one swarm."""

    gained: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    digests: dict[int, bytes] = field(default_factory=dict)

    def add(self, request: Exchange) -> None:
        self.gained.difference_update(request.lost)
        self.lost.update(request.lost)
        self.lost.difference_update(request.gained)
        self.gained.update(request.gained)
        self.digests.update(request.digests)


class FailoverTracker:
    """One node's way to the tracker, whichever there is: a `Tracker`.

    Args:
        changed: called with True when Redis is given up for now, with False when it is back.
        called: called before each call of Redis, to count them.
        probe: seconds between two looks whether it is back.
    """

    def __init__(
        self,
        redis: Tracker,
        without: PeerTracker,
        *,
        changed: Callable[[bool], None] | None = None,
        called: Callable[[], None] = lambda: None,
        probe: float = PROBE,
    ) -> None:
        self._redis = redis
        self._without = without
        self._changed = changed
        self._called = called
        self._probe_every = self._pause = probe
        self._back = float("-inf")
        self._degraded = False
        self._again = False
        self._unsaid: dict[Swarm, _Unsaid] = {}
        self._left: set[Swarm] = set()
        self._probing: asyncio.Task[None] | None = None
        self._meeting: asyncio.Task[None] | None = None
        self._met = float("-inf")

    @property
    def degraded(self) -> bool:
        """Whether this node works without Redis now."""
        return self._degraded

    @property
    def _asked(self) -> Tracker:
        """Redis, for one call, which is counted."""
        self._called()
        return self._redis

    # Members

    async def register(self, peer: Peer, seconds: float) -> bool:
        await self._without.register(peer, seconds)
        again = await self._try(lambda: self._asked.register(peer, seconds))
        if again is None:
            return False
        # What was announced while Redis was away did not reach it.
        again, self._again = again or self._again, False
        return again

    async def unregister(self) -> None:
        if not self._degraded:
            await self._asked.unregister()

    async def members(self) -> list[Peer]:
        found = await self._try(lambda: self._asked.members())
        if found is None:
            return await self._without.members()
        self._know(found)
        return found

    # Swarms

    async def announce(self, swarm: Swarm, have: bytes) -> None:
        async def said() -> bool:
            await self._asked.announce(swarm, have)
            return True

        if await self._try(said) is None:
            self._again = True

    async def leave(self, swarm: Swarm) -> None:
        self._unsaid.pop(swarm, None)
        await self._without.leave(swarm)
        if self._degraded:
            self._left.add(swarm)
        else:
            await self._asked.leave(swarm)

    async def exchange(self, swarm: Swarm, request: Exchange) -> Answer:
        self._left.discard(swarm)
        answer = await self._try(lambda: self._asked.exchange(swarm, self._with_unsaid(swarm, request)))
        if answer is None:
            self._unsaid.setdefault(swarm, _Unsaid()).add(request)
            return await self._without.exchange(swarm, request)
        self._unsaid.pop(swarm, None)
        self._meet()
        return answer

    async def look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        answer = await self._try(lambda: self._asked.look(swarm, chunks))
        return await self._without.look(swarm, chunks) if answer is None else answer

    def _with_unsaid(self, swarm: Swarm, request: Exchange) -> Exchange:
        unsaid = self._unsaid.get(swarm)
        if unsaid is None:
            return request
        whole = _Unsaid(set(unsaid.gained), set(unsaid.lost), dict(unsaid.digests))
        whole.add(request)
        return replace(request, gained=sorted(whole.gained), lost=sorted(whole.lost), digests=whole.digests)

    # Values

    async def add_kin(self, key: str, snapshot_id: str) -> None:
        if not self._degraded:
            await self._asked.add_kin(key, snapshot_id)

    async def kin(self, key: str) -> list[str]:
        return [] if self._degraded else await self._asked.kin(key)

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        return await (self._without if self._degraded else self._asked).once(key, max_age, ask)

    async def remember(self, key: str, value: bytes, seconds: float) -> None:
        if not self._degraded:
            await self._asked.remember(key, value, seconds)

    async def recall(self, key: str) -> bytes | None:
        return None if self._degraded else await self._asked.recall(key)

    async def close(self) -> None:
        tasks = [task for task in (self._probing, self._meeting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._without.close()
        await self._redis.close()

    # Away and back

    async def _try(self, call: Callable[[], Awaitable[_T]]) -> _T | None:
        """What Redis answers; None while it does not."""
        if self._degraded:
            return None
        begun = time.monotonic()
        try:
            return await call()
        except TrackerUnavailable as error:
            failed = error
        if time.monotonic() - begun < SLOW and not self._degraded:
            await asyncio.sleep(PAUSE * (0.5 + random.random()))
            try:
                return await call()
            except TrackerUnavailable as error:
                failed = error
        self._away(failed)
        return None

    def _away(self, error: TrackerUnavailable) -> None:
        if self._degraded:
            return
        self._degraded = self._again = True
        steady = time.monotonic() - self._back >= STEADY
        self._pause = self._probe_every if steady else min(2 * self._pause, LONGEST_PROBE)
        _log.warning("going on without the tracker, with the nodes known last: %s", error)
        self._probing = asyncio.create_task(self._probe())
        if self._changed is not None:
            self._changed(True)

    async def _probe(self) -> None:
        """Look whether Redis is there again, until it is."""
        while True:
            await asyncio.sleep(self._pause * (0.75 + random.random() / 2))
            try:
                self._know(await self._asked.members())
            except TrackerUnavailable as error:
                _log.debug("the tracker is still away: %s", error)
                continue
            break
        self._degraded = False
        self._back = time.monotonic()
        _log.warning("the tracker is back")
        if self._changed is not None:
            self._changed(False)
        left, self._left = self._left, set()
        for swarm in left:
            await self._asked.leave(swarm)

    def _meet(self) -> None:
        """Ask for the members now and then, to know them when Redis is gone."""
        if time.monotonic() - self._met < MEMBERS or (self._meeting and not self._meeting.done()):
            return
        self._met = time.monotonic()
        self._meeting = asyncio.create_task(self._ask_members())

    async def _ask_members(self) -> None:
        with suppress(TrackerUnavailable):
            self._know(await self._asked.members())

    def _know(self, members: list[Peer]) -> None:
        """Whom to go on with; an empty Redis does not make the others unknown."""
        self._met = time.monotonic()
        if len(members) > 1:
            self._without.know(members)
