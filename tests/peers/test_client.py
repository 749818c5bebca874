"""The peer client: what it takes from peers that are slow, broken, or something else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from support.peers import KEYS, Held, asking, held, peer

from headrace.cache.bandwidth import Bandwidth
from headrace.cache.errors import (
    HeadraceError,
    NotAuthenticated,
    OtherVersion,
    PeerBusy,
    PeerError,
    PeerMissing,
)
from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.security import Security
from headrace.cache.peers.server import PeerServer
from headrace.cache.receiving import BLOCK
from headrace.cache.store import Store
from headrace.cache.tracker.protocol import Peer

LATE = 30.0
ID = 64 * "a"
BODY = bytes(range(256)) * 8
QUICK = PeerTimeouts(connect=5.0, first_byte=0.3, stall=0.3)
STALL = b"(stall)"  # stay silent with the connection open


def head(status: str = "200 OK", length: int | None = len(BODY), *more: str, version: str = "1.0") -> bytes:
    lines = [f"HTTP/1.1 {status}", *more]
    if version:
        lines.append(f"Headrace-Version: {version}")
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def nowhere(piece: memoryview) -> None:
    """Takes bytes that are not looked at."""


@dataclass
class Scripted:
    """A server that answers each connection's requests by a script, then closes."""

    scripts: list[list[bytes]]
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def peer(self) -> Peer:
        return Peer("scripted", f"127.0.0.1:{self._listener.getsockname()[1]}")

    def _serve(self) -> None:
        for script in self.scripts:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with sock, contextlib.suppress(ConnectionError):
                for answer in script:
                    asked = b""
                    while not asked.endswith(b"\r\n\r\n"):
                        more = sock.recv(65536)
                        if not more:
                            break
                        asked += more
                    if not asked:
                        break
                    self.requests.append(asked)
                    before, stall, after = answer.partition(STALL)
                    sock.sendall(before)
                    if stall:
                        self.released.wait(LATE)
                        sock.sendall(after)

    def stop(self) -> None:
        self.released.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextlib.contextmanager
def scripted(*scripts: list[bytes]) -> Iterator[Scripted]:
    server = Scripted(list(scripts))
    try:
        yield server
    finally:
        server.stop()


def fetch(server: Scripted, length: int = len(BODY), security: Security = KEYS) -> bytes:
    found = bytearray()
    asking(
        lambda c: c.read_to(server.peer, "default", ID, 0, 1, length, found.extend),
        security,
        timeouts=QUICK,
    )
    return bytes(found)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (head() + BODY[:1000], PeerError, "cut midway"),
        (head(), PeerError, "cut midway"),
        (head() + BODY[:1000] + STALL, PeerError, "nothing for too long"),
        (head() + STALL, PeerError, "nothing for too long"),
        (STALL, PeerError, "nothing for too long"),
        (head()[:20] + STALL, PeerError, "nothing for too long"),
        (head()[:20], PeerError, "middle of the headers"),
        (b"", PeerError, "without an answer"),
        (head(length=len(BODY) - 1) + BODY[:-1], PeerError, "2047 bytes instead of 2048"),
        (head(length=len(BODY) + 1) + BODY + b"x", PeerError, "2049 bytes instead of 2048"),
        (head(length=0), PeerError, "0 bytes instead"),
        (head(length=None) + BODY, PeerError, "without a length"),
        (head("200 OK", len(BODY), "Transfer-Encoding: chunked") + BODY, PeerError, "without a length"),
        (head().replace(b"2048", b"-2048") + BODY, PeerError, "without a length"),
        (head().replace(b"2048", "²048".encode("latin-1")) + BODY, PeerError, "without a length"),
        (head().replace(b"2048", b"9" * 400) + BODY, PeerError, "without a length"),
        (head() + BODY + b"and more", PeerError, "more than it said"),
        (b"\x00\xff garbage \r\n\r\n", PeerError, "not HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", PeerError, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20_000, PeerError, "bytes of headers"),
        (head(version="") + BODY, PeerError, "not a headrace agent"),
        (head(version="2.0") + BODY, OtherVersion, r"version 2\.0 .* upgrade the older"),
        (head("400 Bad Request", 8, version="3.1") + b"whatever", OtherVersion, r"version 3\.1"),
        (head("404 Not Found", 5) + b"gone.", PeerMissing, "gone"),
        (head("401 Unauthorized", 7) + b"secret?", NotAuthenticated, "secret"),
        (head("500 Oops", 5) + b"dead.", PeerError, "500: dead"),
        (head("302 Found", 0, "Location: http://elsewhere/"), PeerError, "answered 302"),
        (head("503 Busy", 5, "Retry-After: 7", "Headrace-Queue: 9") + b"busy.", PeerBusy, "busy"),
        (head("503 Busy", 1 << 40), PeerBusy, "the peer"),
        (head("404 Not Found", 20) + b"\x1b[31mred\x1b[0m\r\nsecond", PeerMissing, r"\[31mred\[0m"),
    ],
)
def test_what_is_no_good_answer_is_an_error(answer: bytes, error: type[HeadraceError], said: str) -> None:
    with scripted([answer], []) as server, pytest.raises(error, match=said) as caught:
        fetch(server)
    assert type(caught.value) is error
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (("Headrace-Retry-After: 0.125", "Retry-After: 1"), 0.125),
        (("Retry-After: 3",), 3.0),
        (("Retry-After: Sun, 06 Nov 1994 08:49:37 GMT",), 1.0),
        (("Headrace-Retry-After: nan",), 1.0),
        (("Headrace-Retry-After: inf",), 1.0),
        (("Headrace-Retry-After: -5",), 1.0),
        ((), 1.0),
    ],
)
def test_a_busy_peer_says_when_to_ask_again(headers: tuple[str, ...], seconds: float) -> None:
    answer = head("503 Busy", 5, "Headrace-Queue: 9", *headers) + b"busy."
    with scripted([answer]) as server, pytest.raises(PeerBusy) as caught:
        fetch(server)
    assert (caught.value.retry_after, caught.value.queue) == (seconds, 9)


@pytest.mark.parametrize(("queue", "number"), [("3", 3), ("", 0), ("-1", 0), ("many", 0), ("9" * 40, 0)])
def test_the_queue_of_the_peer_is_returned(queue: str, number: int) -> None:
    with scripted([head("200 OK", len(BODY), f"Headrace-Queue: {queue}") + BODY]) as server:
        found = asking(lambda c: c.read_to(server.peer, "default", ID, 0, 1, len(BODY), nowhere))
    assert found == number


def test_unknown_headers_and_a_newer_minor_version_are_taken() -> None:
    with scripted([head("200 Fine", len(BODY), "Headrace-Later: 1", version="1.9") + BODY]) as server:
        assert fetch(server) == BODY


def test_bytes_are_handed_on_in_blocks_as_they_come(store: Store) -> None:
    made = held(store, (3 * BLOCK + 17,))
    made.fill()
    sizes: list[int] = []
    with PeerServer(store, KEYS) as server:
        asking(
            lambda c: c.read_to(
                peer(server), "default", made.id, 0, 1, len(made.content), lambda p: sizes.append(len(p))
            )
        )
    made.close()
    assert sizes == [BLOCK, BLOCK, BLOCK, 17]


def test_a_connection_is_used_again_and_a_stale_one_replaced() -> None:
    again = head() + BODY
    with scripted([again, again, again], [again]) as server:

        async def work(client: PeerClient) -> None:
            for _ in range(4):
                found = bytearray()
                await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), found.extend)
                assert found == BODY

        asking(work)
        assert server.connections == 2


@pytest.mark.parametrize("said", ["Connection: close", "connection: Close"])
def test_a_connection_that_the_peer_closes_is_not_used_again(said: str) -> None:
    last = head("200 OK", len(BODY), said) + BODY
    with scripted([last], [last]) as server:

        async def work(client: PeerClient) -> None:
            for _ in range(2):
                await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), nowhere)

        asking(work)
        assert server.connections == 2


def test_a_connection_goes_on_after_a_refusal() -> None:
    with scripted([head("404 Not Found", 5) + b"gone.", head() + BODY]) as server:

        async def work(client: PeerClient) -> None:
            with pytest.raises(PeerMissing):
                await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), nowhere)
            await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), nowhere)

        asking(work)
        assert server.connections == 1


def test_what_put_raises_ends_the_reading_and_the_connection() -> None:
    class Full(Exception):
        pass

    def put(piece: memoryview) -> None:
        raise Full

    with scripted([head() + BODY], [head() + BODY]) as server:

        async def work(client: PeerClient) -> None:
            with pytest.raises(Full):
                await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), put)
            await client.read_to(server.peer, "default", ID, 0, 1, len(BODY), nowhere)

        asking(work)
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [STALL, head() + STALL, head() + BODY[:100] + STALL, head()[:10] + STALL],
    ids=["silent", "no body", "some of the body", "in the headers"],
)
def test_cancelled_it_ends_at_once_and_puts_nothing_any_more(answer: bytes) -> None:
    put: list[int] = []

    async def work(client: PeerClient) -> None:
        task = asyncio.create_task(
            client.read_to(server.peer, "default", ID, 0, 1, len(BODY), lambda p: put.append(len(p)))
        )
        while not server.requests:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, LATE / 2)
        had = len(put)
        server.released.set()
        await asyncio.sleep(0.05)
        assert len(put) == had

    # Its own patience would be longer than the test's.
    with scripted([answer + BODY]) as server:
        asking(work, timeouts=PeerTimeouts(first_byte=600, stall=600))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "cannot be reached: .*refused"),
        ("no-such-host.invalid:80", "cannot be reached"),
        ("nonsense", "has to be host:port"),
        ("127.0.0.1:port", "has to be host:port"),
        ("127.0.0.1:99999", "has to be host:port"),
        ("", "has to be host:port"),
        ("[::1", "has to be host:port"),
        ("255.255.255.255:80", "cannot be reached"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence(address: str, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        asking(lambda c: c.ping(Peer("x", address)))


@pytest.mark.parametrize("full", [False, True])
def test_a_peer_that_does_not_answer_the_call_is_given_up(full: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.ExitStack() as stack:
            if full:  # the queue of connections: another one gets no answer at all
                for _ in range(3):
                    waiting = stack.enter_context(socket.socket())
                    waiting.setblocking(False)
                    waiting.connect_ex(listener.getsockname())
            with pytest.raises(PeerError, match=r"answer|nothing for too long"):
                asking(lambda c: c.ping(Peer("x", address)), timeouts=PeerTimeouts(0.3, 0.3, 0.3))


def test_answers_that_do_not_fit_are_refused() -> None:
    def one(answer: bytes, work: Callable[[PeerClient, Peer], object]) -> None:
        with scripted([answer]) as server, pytest.raises(PeerError):
            asking(lambda c: work(c, server.peer))  # type: ignore[arg-type, return-value]

    one(head("200 OK", 2) + b"xx", lambda c, p: c.held(p, "default", ID, 8))
    one(head("200 OK", 1) + b"x", lambda c, p: c.held(p, "default", ID, 9))
    one(head("200 OK", 16) + b"x" * 16, lambda c, p: c.digests(p, "default", ID, 0, 1))
    wrong = head("200 OK", 15, "Headrace-Algorithm: xxh3-128") + b"x" * 15
    one(wrong, lambda c, p: c.digests(p, "default", ID, 0, 1))
    strange = head("200 OK", 16, "Headrace-Algorithm: md5") + b"x" * 16
    one(strange, lambda c, p: c.digests(p, "default", ID, 0, 1))
    one(head("200 OK", 1 << 40), lambda c, p: c.manifest(p, "default", ID))


def test_many_readings_at_once_do_not_mix(store: Store, server: PeerServer) -> None:
    made = held(store, [50_000 + n for n in range(40)], seed=3)
    made.fill()

    async def work(client: PeerClient) -> None:
        async def one(index: int) -> None:
            found = bytearray()
            while True:
                try:
                    length = made.file.grid.lengths[index]
                    await client.read_to(
                        peer(server), "default", made.id, index, index + 1, length, found.extend
                    )
                    break
                except PeerBusy as busy:
                    await asyncio.sleep(busy.retry_after)
            assert found == made.bytes_of(index, index + 1)

        async with asyncio.TaskGroup() as group:
            for index in range(made.chunks):
                group.create_task(one(index))

    asking(work)
    made.close()


def test_a_cancelled_reading_frees_the_peers_slot(store: Store, one: Held) -> None:
    one.fill()
    bandwidth = Bandwidth({("peers", "demand"): 1.0})
    with PeerServer(store, KEYS, slots=1, bandwidth=bandwidth) as server:

        async def work(client: PeerClient) -> None:
            task = asyncio.create_task(
                client.read_to(peer(server), "default", one.id, 2, 3, 2_500_000, nowhere)
            )
            while not server.stats().active["demand"]:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(LATE):
                while server.stats().active["demand"]:
                    await asyncio.sleep(0.005)

        asking(work)
