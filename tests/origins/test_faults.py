"""A faulty server, described as data: transient faults are ridden out, the rest end in one sentence."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from support import origin_contract
from support.faulty_server import Fault, FaultyServer, spawn
from support.models import PATIENT
from support.origin_contract import payload, read

from headrace.cache import reference
from headrace.cache.errors import (
    AccessDenied,
    NotFound,
    OriginChanged,
    OriginError,
    OriginMisconfigured,
    OriginUnavailable,
)
from headrace.cache.origins import RetryingOrigin, open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import OriginFile

pytestmark = pytest.mark.usefixtures("both_ways")

T = TypeVar("T")
DATA = payload(12 << 20)
QUICK = OriginOptions(attempts=4, backoff_base=0.001, first_byte_timeout=0.4, stall_timeout=0.4)
PATH = "bucket/a.bin"


@pytest.fixture(params=["http", "s3"])
def scheme(request: pytest.FixtureRequest) -> str:
    """The same faults behind both kinds of obstore's stores."""
    return str(request.param)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any keys do: this server looks at none."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer({PATH: DATA}) as server:
        yield server


def ask(
    server: FaultyServer,
    scheme: str,
    body: Callable[[RetryingOrigin], Awaitable[T]],
    options: OriginOptions = PATIENT,
) -> T:
    if scheme == "s3":
        options = dataclasses.replace(options, endpoint=server.url, region="us-east-1")
    uri = "s3://bucket" if scheme == "s3" else f"{server.url}/bucket"

    async def main() -> T:
        origin = open_origin(reference.parse(uri), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


async def pinned(origin: RetryingOrigin) -> OriginFile:
    file = await origin.stat("a.bin")
    assert file is not None
    return file


async def whole(origin: RetryingOrigin) -> bytes:
    return await read(origin, await pinned(origin))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=500, first=2),
        Fault("status", status=503, body=b"<Error><Code>SlowDown</Code></Error>", first=2),
        Fault("status", status=429, first=2),
        Fault("status", status=408, first=1),
        Fault("reset", after=-1, first=2),
        Fault("reset", after=5 << 20, first=2),
        Fault("truncate", after=9 << 20, first=2),
        Fault("truncate", after=0, nth=1),
        Fault("stall", after=-1, seconds=30, first=1),
        Fault("stall", after=5 << 20, seconds=30, first=1),
        Fault("wrong_range", first=1),
        Fault("long_body", after=4096, first=1),
        Fault("wrong_length", after=10, first=1),
        Fault("latency", seconds=0.05),
    ],
    ids=lambda f: f"{f.kind}-{f.status if f.kind == 'status' else f.after}",
)
def test_transient_faults_are_ridden_out(server: FaultyServer, scheme: str, fault: Fault) -> None:
    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        # Not the whole file, so that a body longer than what was asked for has something to hold.
        return await read(origin, file, 0, len(DATA) - 8192)

    server.faults = [fault]
    options = QUICK if fault.kind == "stall" else PATIENT
    assert ask(server, scheme, body, options) == DATA[: len(DATA) - 8192]


def test_after_a_cut_no_whole_piece_is_fetched_again(
    server: FaultyServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a reset, after which the kernel throws away what it has received and not handed on."""
    monkeypatch.setattr("headrace.cache.origins.obstore.PIECE", 4 << 20)
    cut = 3 if origin_contract.way == "pieces" else 1  # put: one request, handed on by the MiB
    server.faults = [Fault("truncate", after=1 << 20 if cut == 3 else 9 << 20, nth=cut)]
    assert ask(server, scheme, whole) == DATA
    starts = [request.start for request in server.requests(PATH)]
    assert starts == ([0, 4 << 20, 8 << 20, 8 << 20] if cut == 3 else [0, 9 << 20])


def test_a_quiet_server_sends_each_byte_once(server: FaultyServer, scheme: str) -> None:
    async def body(origin: RetryingOrigin) -> int:
        file = await pinned(origin)
        step = 1 << 20
        parts = [read(origin, file, s, s + step) for s in range(0, len(DATA), step)]
        assert b"".join(await asyncio.gather(*parts)) == DATA
        return origin.counters.bytes

    assert ask(server, scheme, body) == len(DATA)
    assert server.multiplicity(PATH) == {1: len(DATA)}


@pytest.mark.parametrize(
    ("fault", "kind", "sentence"),
    [
        (Fault("status", status=503), OriginUnavailable, "503 Service Unavailable.*tried 4 times in a row"),
        (Fault("reset", after=-1), OriginUnavailable, "connection was reset.*tried 4 times"),
        (Fault("truncate", after=100), OriginUnavailable, "stopped midway.*tried 4 times"),
        (Fault("wrong_range"), OriginUnavailable, "another range.*tried 4 times"),
        (Fault("status", status=403), AccessDenied, "403 Forbidden.*credentials|check AWS_ACCESS_KEY_ID"),
        (Fault("status", status=401), AccessDenied, "401 Unauthorized"),
        (Fault("status", status=404), NotFound, "does not exist"),
        (Fault("status", status=412), OriginChanged, "no longer the version"),
        (Fault("status", status=416), OriginChanged, "shorter"),
        (Fault("status", status=301), OriginMisconfigured, "not served by this region or endpoint"),
        (Fault("status", status=418), OriginError, "418"),
        (Fault("ignore_range"), OriginMisconfigured, "ignores byte ranges"),
    ],
    ids=lambda p: f"{p.kind}-{p.status}" if isinstance(p, Fault) else "",
)
def test_lasting_faults_end_in_one_clear_sentence(
    server: FaultyServer, scheme: str, fault: Fault, kind: type[OriginError], sentence: str
) -> None:
    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        return await read(origin, file, 0, len(DATA) - 1)

    server.faults = [fault]
    with pytest.raises(kind, match=sentence) as caught:
        ask(server, scheme, body)
    text = str(caught.value)
    assert PATH in text
    assert text.endswith(".")
    assert "\n" not in text


def test_an_expired_token_says_so(server: FaultyServer) -> None:
    said = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
    server.faults = [Fault("status", status=400, body=said)]
    with pytest.raises(AccessDenied, match=r"have expired.*ExpiredToken.*renew"):
        ask(server, "s3", whole)


def test_a_wrong_region_names_the_setting(server: FaultyServer) -> None:
    said = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
    server.faults = [Fault("status", status=400, body=said)]
    with pytest.raises(OriginMisconfigured, match="AWS_REGION"):
        ask(server, "s3", whole)


def test_a_server_that_is_not_there_is_unavailable(server: FaultyServer, scheme: str) -> None:
    server.stop()
    with pytest.raises(OriginUnavailable, match=r"connection was refused.*tried 4 times"):
        ask(server, scheme, whole)


def test_a_name_that_does_not_resolve_is_unavailable() -> None:
    async def main() -> None:
        origin = open_origin(reference.parse("http://no-such-host.invalid/m"), QUICK)
        await origin.stat("a.bin")

    with pytest.raises(OriginUnavailable, match=r"host name of http://no-such-host.invalid/m/a.bin"):
        asyncio.run(main())


@pytest.mark.parametrize("honours_if_match", [True, False])
def test_an_object_replaced_midway_is_noticed(scheme: str, honours_if_match: bool) -> None:
    """The first range is the old version's; no byte of the new one is handed out."""

    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        assert await read(origin, file, 0, 1000) == DATA[:1000]
        return await read(origin, file, 1000, 2000)

    with FaultyServer(
        {PATH: DATA}, honours_if_match=honours_if_match, faults=[Fault("replace", nth=2)]
    ) as server:
        with pytest.raises(OriginChanged, match=r"a\.bin"):
            ask(server, scheme, body)
        assert server.files[PATH] != DATA


def test_an_object_replaced_during_a_retry_is_noticed(server: FaultyServer, scheme: str) -> None:
    server.faults = [Fault("truncate", after=5 << 20, nth=1), Fault("replace", nth=2)]
    with pytest.raises(OriginChanged, match=r"a\.bin"):
        ask(server, scheme, whole)


def test_refusals_are_not_tried_again(server: FaultyServer, scheme: str) -> None:
    server.faults = [Fault("status", status=403)]
    with pytest.raises(AccessDenied):
        ask(server, scheme, whole)
    assert len(server.requests(PATH)) == 1


def test_what_the_taker_of_the_bytes_raises_is_not_the_origins_failure(
    server: FaultyServer, scheme: str
) -> None:
    error = OSError(errno.EIO, "the disk fails")

    async def body(origin: RetryingOrigin) -> None:
        file = await pinned(origin)

        def put(_: object) -> None:
            raise error

        with ThreadPoolExecutor(1) as pool:
            await origin.read_to(file, 0, 1000, put, pool)

    with pytest.raises(OSError) as caught:
        ask(server, scheme, body)
    assert caught.value is error
    assert len(server.requests(PATH)) == 1


def test_a_slow_connection_that_moves_is_not_a_stalled_one(server: FaultyServer, scheme: str) -> None:
    """A piece takes longer than the stall timeout here, and no wait for a single byte does."""

    async def body(origin: RetryingOrigin) -> bytes:
        return await read(origin, await pinned(origin), 0, 1 << 20)

    server.faults = [Fault("throttle", rate=1.2e6)]
    # If a piece had to come in time, every attempt would end too early.
    assert ask(server, scheme, body, QUICK) == DATA[: 1 << 20]


def test_a_server_of_its_own_process_keeps_count(tmp_path: Path) -> None:
    """The same server for benchmarks; its faults travel to the child."""
    folder = tmp_path
    (folder / "a.bin").write_bytes(DATA[:100_000])
    with spawn(folder, faults=[Fault("status", status=500, first=1)]) as child:

        async def main() -> bytes:
            origin = open_origin(reference.parse(child.url), PATIENT)
            try:
                return await whole(origin)
            finally:
                await origin.close()

        assert asyncio.run(main()) == DATA[:100_000]
        assert [row["status"] for row in child.log()] == [500, 206]
        assert child.bytes_sent() == 100_000
