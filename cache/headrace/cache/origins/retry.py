"""Patience with origins: timeouts, backoff and resumption, once, for every kind.

`RetryingOrigin` wraps an adapter, which does single attempts. What the adapter raises as
`OriginUnavailable` is tried again after an exponential backoff with full jitter (a random wait
between nothing and the bound, so that many nodes do not come back in step); a ranged read goes on
from the piece it had reached. Everything else (denied, absent, changed, misconfigured) is raised at
once, for trying again cannot help.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from headrace.cache.errors import OriginMisconfigured, OriginUnavailable
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, Origin, OriginFile
from headrace.cache.reference import quoted

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


@dataclass(slots=True)
class Counters:
    """What an origin was asked for, in this process.

    Attributes:
        bytes: bytes of ranged reads that arrived and were handed on.
        attempts: reads and other requests that were begun, retries included.
        retries: how many of those were retries.
    """

    bytes: int = 0
    attempts: int = 0
    retries: int = 0


class RetryingOrigin:
    """An `Origin` that does what its adapter does, patiently.

    Args:
        adapter: does single attempts; may set `notices_stalls = True` if it watches each socket
            itself, which is finer than the time between two pieces.
        options: attempts, backoff and timeouts.
        sleep, uniform, clock: for tests.
    """

    def __init__(
        self,
        adapter: Origin,
        options: OriginOptions,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapter = adapter
        self.options = options
        self.counters = Counters()
        self._sleep = sleep
        self._uniform = uniform
        self._clock = clock
        self._guards = not getattr(adapter, "notices_stalls", False)

    @property
    def uri(self) -> str:
        return self.adapter.uri

    async def list(self) -> Listing:
        """See `Origin.list`; each attempt lists anew."""
        return await self._persist(self.adapter.list)

    async def stat(self, path: str) -> OriginFile | None:
        """See `Origin.stat`."""
        return await self._persist(lambda: self._limited(self.adapter.stat(path), path))

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """See `Origin.fetch`."""
        return await self._persist(lambda: self._limited(self.adapter.fetch(path, limit), path))

    async def put(self, path: str, source: str) -> None:
        """See `Origin.put`; each attempt uploads the whole file."""
        await self._persist(lambda: self.adapter.put(path, source))

    async def put_bytes(self, path: str, data: bytes) -> None:
        """See `Origin.put_bytes`."""
        await self._persist(lambda: self.adapter.put_bytes(path, data))

    async def close(self) -> None:
        await self.adapter.close()

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """See `Origin.read`. A retry goes on behind the last whole piece that was handed on.

        Raises:
            OriginUnavailable: no piece arrived in `attempts` attempts in a row.
            OriginMisconfigured: the adapter handed out more bytes than were asked for.
        """
        position, failures, began = start, 0, self._clock()
        while position < stop:
            reached = position
            self.counters.attempts += 1
            try:
                async with contextlib.aclosing(self._pieces(file, position, stop)) as pieces:
                    async for piece in pieces:
                        size = memoryview(piece).nbytes
                        if size > stop - position:
                            raise OriginMisconfigured(
                                f"{self._at(file.path)} sent more bytes than the {stop - start} that were asked for: "
                                "use a server that keeps to the Range of a request."
                            )
                        position += size
                        self.counters.bytes += size
                        yield piece
                if position < stop:
                    raise OriginUnavailable(
                        f"the answer of {self._at(file.path)} ended {stop - position} bytes too early."
                    )
            except OriginUnavailable as error:
                # What moves on is not failing: the count starts anew with every piece that arrived.
                failures = 1 if position > reached else failures + 1
                await self._wait(error, failures, began)

    async def _pieces(self, file: OriginFile, start: int, stop: int) -> AsyncGenerator[Buffer, None]:
        """One attempt, with a limit to the wait for each piece."""
        limit = self.options.first_byte_timeout
        pieces = self.adapter.read(file, start, stop)
        try:
            while True:
                try:
                    async with asyncio.timeout(limit if self._guards else None):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise OriginUnavailable(
                        f"{self._at(file.path)} sent nothing for {limit:g} seconds."
                    ) from None
                yield piece
                limit = self.options.stall_timeout
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def _limited(self, request: Awaitable[T], path: str) -> T:
        """A small request, with a limit to all of it."""
        limit = self.options.connect_timeout + self.options.first_byte_timeout + self.options.stall_timeout
        try:
            async with asyncio.timeout(limit):
                return await request
        except TimeoutError:
            raise OriginUnavailable(f"{self._at(path)} did not answer within {limit:g} seconds.") from None

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        failures, began = 0, self._clock()
        while True:
            self.counters.attempts += 1
            try:
                return await attempt()
            except OriginUnavailable as error:
                failures += 1
                await self._wait(error, failures, began)

    async def _wait(self, error: OriginUnavailable, failures: int, began: float) -> None:
        """Back off after the `failures`-th failure in a row, or give up."""
        if failures >= self.options.attempts:
            times = "once" if failures == 1 else f"{failures} times in a row"
            raise OriginUnavailable(
                f"{str(error).rstrip('.')}; tried {times} over {self._clock() - began:.1f} s: "
                "check the origin, then run this again to resume.",
                error.retry_after,
            ) from error
        self.counters.retries += 1
        bound = min(self.options.backoff_max, self.options.backoff_base * 2.0 ** (failures - 1))
        await self._sleep(max(self._uniform(0.0, bound), error.retry_after or 0.0))

    def _at(self, path: str) -> str:
        return f"{self.uri}/{quoted(path)}"
