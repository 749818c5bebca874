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
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from headrace.cache.errors import OriginMisconfigured, OriginUnavailable
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import DirectReads, Listing, Origin, OriginFile
from headrace.cache.reference import quoted
from headrace.cache.threads import to_its_end

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


class _Attempts:
    """The attempts of one ranged read: how far it is, and what an attempt's end means.

    As a context manager around each attempt: what may be tried again is swallowed after a wait.
    """

    def __init__(self, origin: RetryingOrigin, file: OriginFile, start: int, stop: int) -> None:
        self.position = start
        self._origin, self._file = origin, file
        self._start, self._stop = start, stop
        self._reached, self._failures = start, 0
        self._began = origin.clock()

    @property
    def left(self) -> bool:
        """Whether there is more to read."""
        return self.position < self._stop

    def expect(self, size: int) -> None:
        """A piece arrived. Raises: OriginMisconfigured: it is more than was asked for."""
        if size > self._stop - self.position:
            raise OriginMisconfigured(
                f"{self._origin.at(self._file.path)} sent more bytes than the {self._stop - self._start} that were "
                "asked for: use a server that keeps to the Range of a request."
            )

    def advance(self, size: int) -> None:
        """A piece is handed on."""
        self.expect(size)
        self.position += size
        self._origin.counters.bytes += size

    async def __aenter__(self) -> None:
        self._reached = self.position
        self._origin.counters.attempts += 1

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None and self.left:
            error = OriginUnavailable(
                f"the answer of {self._origin.at(self._file.path)} ended {self._stop - self.position} bytes too early."
            )
        if not isinstance(error, OriginUnavailable):
            return False
        # What moves on is not failing: the count starts anew with every piece that arrived.
        self._failures = 1 if self.position > self._reached else self._failures + 1
        await self._origin.wait(error, self._failures, self._began)
        return True


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
        self.clock = clock
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
        attempt = _Attempts(self, file, start, stop)
        while attempt.left:
            async with attempt, contextlib.aclosing(self._pieces(file, attempt.position, stop)) as pieces:
                async for piece in pieces:
                    attempt.advance(memoryview(piece).nbytes)
                    yield piece

    async def read_to(
        self, file: OriginFile, start: int, stop: int, put: Callable[[Buffer], None], pool: Executor
    ) -> None:
        """Call `put` in threads with the bytes [start, stop), in order; patiently, as `read`.

        Cancelled, it returns when nothing is put any more.

        Args:
            put: gets pieces that may change once it has returned; what it raises ends the reading.
            pool: where to call it, unless the adapter has a cheaper way of its own.
        """
        attempt = _Attempts(self, file, start, stop)

        def forward(piece: Buffer) -> None:
            put(piece)
            attempt.advance(memoryview(piece).nbytes)

        while attempt.left:
            async with attempt:
                if isinstance(self.adapter, DirectReads) and await self.adapter.read_to(
                    file, attempt.position, stop, forward
                ):
                    continue
                async with contextlib.aclosing(self._pieces(file, attempt.position, stop)) as pieces:
                    async for piece in pieces:
                        attempt.expect(memoryview(piece).nbytes)
                        await to_its_end(pool, forward, piece)

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
                        f"{self.at(file.path)} sent nothing for {limit:g} seconds."
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
            raise OriginUnavailable(f"{self.at(path)} did not answer within {limit:g} seconds.") from None

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        failures, began = 0, self.clock()
        while True:
            self.counters.attempts += 1
            try:
                return await attempt()
            except OriginUnavailable as error:
                failures += 1
                await self.wait(error, failures, began)

    async def wait(self, error: OriginUnavailable, failures: int, began: float) -> None:
        """Back off after the `failures`-th failure in a row, or give up."""
        if failures >= self.options.attempts:
            times = "once" if failures == 1 else f"{failures} times in a row"
            raise OriginUnavailable(
                f"{str(error).rstrip('.')}; tried {times} over {self.clock() - began:.1f} s: "
                "check the origin, then run this again to resume.",
                error.retry_after,
            ) from error
        self.counters.retries += 1
        bound = min(self.options.backoff_max, self.options.backoff_base * 2.0 ** (failures - 1))
        await self._sleep(max(self._uniform(0.0, bound), error.retry_after or 0.0))

    def at(self, path: str) -> str:
        return f"{self.uri}/{quoted(path)}"
