"""Work in threads that a cancelled task does not leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(
    pool: Executor, work: Callable[..., T], *args: object, cancel: Callable[[], None] = lambda: None
) -> T:
    """Run in a pool; when cancelled, call `cancel` and wait until it is over: a claim must outlive its writes."""
    job = asyncio.get_running_loop().run_in_executor(pool, work, *args)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        cancel()
        await asyncio.wait([job])
        # What it failed with matters no more; unasked, it would be reported as lost.
        if not job.cancelled():
            job.exception()
        raise


async def stoppable(work: Coroutine[Any, Any, T], stop: Callable[[], None]) -> T:
    """Await; when cancelled, call `stop` before the work is cancelled and waited for: its threads may wait for more
    than it would end by itself."""
    job = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        stop()
        job.cancel()
        await asyncio.wait([job])
        if not job.cancelled():
            job.exception()
        raise
