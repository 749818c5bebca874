"""Patience: what is tried again, how long is waited, where a read goes on, what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from typing_extensions import Buffer

from headrace.cache.errors import (
    AccessDenied,
    HeadraceError,
    NotFound,
    OriginChanged,
    OriginMisconfigured,
    OriginUnavailable,
    UsageError,
)
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.origins.retry import RetryingOrigin

DATA = bytes(range(100))
FILE = OriginFile("a.bin", 100, Pin("etag", "1"))
DOWN = OriginUnavailable("the origin is down.")

Step = int | HeadraceError | float
"""One step of an attempt: hand out so many bytes, raise, or (a float) be silent for so many seconds."""


@dataclass
class Scripted:
    """An adapter whose every attempt follows a script; it is an origin of its own kind, in memory."""

    script: list[list[Step]]
    asked: list[tuple[int, int]] = field(default_factory=list)
    closed: int = 0
    uri: str = "test://model"

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        self.asked.append((start, stop))
        try:
            for step in self.script.pop(0):
                if isinstance(step, HeadraceError):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                yield (DATA + DATA)[start : start + step]
                start += step
        finally:
            self.closed += 1

    async def list(self) -> Listing:
        for step in self.script.pop(0):
            if isinstance(step, HeadraceError):
                raise step
        return Listing(self.uri, (FILE,))

    async def stat(self, path: str) -> OriginFile | None:
        for step in self.script.pop(0):
            if isinstance(step, float):
                await asyncio.sleep(step)
        return FILE

    async def fetch(self, path: str, limit: int) -> bytes | None:
        raise UsageError("not in these scripts")

    async def put(self, path: str, source: str) -> None:
        raise UsageError("not in these scripts")

    async def put_bytes(self, path: str, data: bytes) -> None:
        raise UsageError("not in these scripts")

    async def close(self) -> None:
        """Nothing is open."""


@dataclass
class Run:
    """What came of reading all of DATA by a script."""

    data: bytes
    waits: list[float]
    bounds: list[float]
    adapter: Scripted
    origin: RetryingOrigin


def run(script: list[list[Step]], options: OriginOptions | None = None) -> Run:
    waits: list[float] = []
    bounds: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    def uniform(low: float, high: float) -> float:
        bounds.append(high)
        return high / 2

    async def main() -> bytes:
        return b"".join([bytes(memoryview(p)) async for p in origin.read(FILE, 0, 100)])

    adapter = Scripted(script)
    origin = RetryingOrigin(adapter, options or OriginOptions(), sleep=sleep, uniform=uniform)
    return Run(asyncio.run(main()), waits, bounds, adapter, origin)


def test_a_read_without_trouble_is_one_attempt() -> None:
    done = run([[60, 40]])
    assert done.data == DATA
    assert done.adapter.asked == [(0, 100)]
    assert (done.origin.counters.bytes, done.origin.counters.attempts, done.origin.counters.retries) == (
        100,
        1,
        0,
    )


def test_a_read_goes_on_from_the_piece_it_had_reached() -> None:
    done = run([[30, 20, DOWN], [10, DOWN], [40]])
    assert done.data == DATA
    assert done.adapter.asked == [(0, 100), (50, 100), (60, 100)]
    assert (done.origin.counters.bytes, done.origin.counters.attempts, done.origin.counters.retries) == (
        100,
        3,
        2,
    )


def test_a_short_answer_is_gone_on_with() -> None:
    done = run([[30], [70]])
    assert done.data == DATA
    assert done.adapter.asked == [(0, 100), (30, 100)]


def test_too_many_bytes_are_an_error_and_not_handed_on() -> None:
    with pytest.raises(OriginMisconfigured, match=r"test://model/a\.bin sent more bytes"):
        run([[60, 41]])


def test_waits_double_up_to_their_bound_with_full_jitter() -> None:
    options = OriginOptions(attempts=7, backoff_base=0.1, backoff_max=1.0)
    script: list[list[Step]] = [[DOWN] for _ in range(6)]
    done = run([*script, [100]], options)
    assert done.bounds == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert done.waits == [bound / 2 for bound in done.bounds]


def test_the_wait_that_the_origin_asks_for_is_kept() -> None:
    done = run([[OriginUnavailable("slow down.", retry_after=7.0)], [100]])
    assert done.waits == [7.0]


def test_progress_starts_the_count_anew() -> None:
    options = OriginOptions(attempts=2)
    assert run([[20, DOWN], [20, DOWN], [20, DOWN], [40]], options).data == DATA


def test_after_all_attempts_one_sentence_says_what_happened_last() -> None:
    with pytest.raises(
        OriginUnavailable, match=r"the origin is down; tried 3 times in a row over .* s: .*\.$"
    ):
        run([[DOWN]] * 3, OriginOptions(attempts=3))


def test_one_attempt_never_retries() -> None:
    with pytest.raises(OriginUnavailable, match="tried once"):
        run([[DOWN]], OriginOptions(attempts=1))


@pytest.mark.parametrize("kind", [AccessDenied, NotFound, OriginChanged, OriginMisconfigured])
def test_what_trying_again_cannot_help_is_raised_at_once(kind: Callable[[str], HeadraceError]) -> None:
    with pytest.raises(HeadraceError) as caught:
        run([[30, kind("no.")]])
    assert type(caught.value) is kind


def test_silence_before_the_first_piece_and_between_pieces_is_ended_and_ridden_out() -> None:
    options = OriginOptions(first_byte_timeout=0.05, stall_timeout=0.05)
    done = run([[30.0], [10, 30.0], [90]], options)
    assert done.data == DATA
    assert done.adapter.asked == [(0, 100), (0, 100), (10, 100)]
    assert done.adapter.closed == 3


def test_silence_for_ever_says_so() -> None:
    with pytest.raises(OriginUnavailable, match=r"a\.bin sent nothing for 0\.02 seconds; tried 2 times"):
        run([[30.0], [30.0]], OriginOptions(attempts=2, first_byte_timeout=0.02, stall_timeout=0.02))


def test_small_requests_have_a_limit_too() -> None:
    async def main() -> OriginFile | None:
        options = OriginOptions(
            connect_timeout=0.01, first_byte_timeout=0.01, stall_timeout=0.01, backoff_base=0
        )
        return await RetryingOrigin(Scripted([[30.0], []]), options).stat("a.bin")

    assert asyncio.run(main()) == FILE


def test_listing_is_tried_again() -> None:
    async def main() -> Listing:
        return await RetryingOrigin(Scripted([[DOWN], []]), OriginOptions(backoff_base=0)).list()

    assert asyncio.run(main()).files == (FILE,)


def test_a_cancelled_read_ends_at_once_and_closes_what_it_had_open() -> None:
    adapter = Scripted([[10, 60.0, 90]])

    async def main() -> None:
        origin = RetryingOrigin(adapter, OriginOptions())

        async def reader() -> None:
            async for _ in origin.read(FILE, 0, 100):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(reader())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())
    assert adapter.closed == 1


def test_a_wait_between_attempts_is_cancelled_at_once() -> None:
    async def main() -> None:
        origin = RetryingOrigin(Scripted([[DOWN]]), OriginOptions(backoff_base=3600, backoff_max=3600))
        task = asyncio.create_task(origin.list())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())


def test_reading_no_bytes_asks_nothing() -> None:
    adapter = Scripted([])

    async def main() -> list[Buffer]:
        return [p async for p in RetryingOrigin(adapter, OriginOptions()).read(FILE, 50, 50)]

    assert asyncio.run(main()) == []
    assert adapter.asked == []
