"""Ranges over plain HTTP, from the socket into memory that is used again and again.

The cheapest way from an origin to a file: the kernel fills a block that stays in the processor's cache
while it is hashed and written, where a client library makes each body a fresh buffer (from nginx, with
hashing: 0.70 against 0.98 CPU s/GB of bare obstore without). It takes only the answer it hopes for, a 206
with the very range and version, and understands refusals; whatever else a server says is left to the adapter's
usual client, and with it TLS, proxies and redirects.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import mmap
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from headrace.cache.errors import OriginUnavailable
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.threads import to_its_end

BLOCK = 1 << 20
"""Bytes handed on at once: about a core's second-level cache (256 KiB cost half as much again, 4 MiB a tenth)."""

_ERROR_BODY = 64 << 10
_IN_HAND = 8192  # what reading the headers may have taken of the body

Accept = Callable[[http.client.HTTPMessage], None]
"""Looks at the headers of an answer."""

Put = Callable[[memoryview], None]
"""Takes the next bytes; they change once it has returned."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is read.

    Attributes:
        url: with everything that authorises the request; never quoted in a message.
        uri: the same for messages.
        headers: sent with each request.
    """

    url: str = field(repr=False)
    uri: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Declined(Exception):
    """The answer was not the one hoped for; nothing was handed on. Another client should ask again."""


class _Refused(Exception):
    """A server that says no; the text is its body, for the code in it."""

    def __init__(self, status: int, headers: Mapping[str, str], body: str) -> None:
        super().__init__(body)
        self.status = status
        self.headers = headers


class _Stale(Exception):
    """A connection that rested was closed meanwhile."""


class Wire:
    """Keeps connections, and the threads that read from them.

    Args:
        options: its timeouts hold for every wait.
        connections: reads at once at most; more wait.
    """

    def __init__(self, options: OriginOptions, connections: int = 64) -> None:
        self._options = options
        self._threads = ThreadPoolExecutor(connections, "headrace-wire")
        self._idle: dict[tuple[str, int], list[http.client.HTTPConnection]] = {}
        self._memory = threading.local()

    async def get(self, target: Target, start: int, stop: int, accept: Accept, put: Put) -> None:
        """Bring the bytes [start, stop) to `put`, in order, in blocks that end at multiples of `BLOCK`.

        Cancelled, it returns when nothing is put any more.

        Args:
            accept: looks at the headers of the answer; raises `Declined`, or what the caller should see.
            put: called in a thread; what it raises ends the reading.

        Raises:
            Declined: another client should ask.
            OriginError: the connection failed midway, or the server refused.
        """
        parts = urlsplit(target.url)
        place = (parts.hostname or "", parts.port or 80)
        idle = self._idle.setdefault(place, [])
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        headers = {"User-Agent": "headrace", **target.headers, "Range": f"bytes={start}-{stop - 1}"}
        while True:
            rested = idle.pop() if idle else None
            connection = rested or await self._connect(place)
            transfer = _Transfer(connection, start, stop, accept, put)
            try:
                await self._run(transfer, path, headers)
            except _Stale:
                if rested is None:
                    raise OriginUnavailable(f"the connection was reset at {target.uri}.") from None
                continue  # a server may close a connection that rests
            except TimeoutError:
                raise OriginUnavailable(f"the server of {target.uri} sent nothing for too long.") from None
            except (_Refused, http.client.HTTPException, ConnectionError) as error:
                raise translate.foreign(error, target.uri) from None
            finally:
                if transfer.reusable:
                    idle.append(connection)
                else:
                    connection.close()
            return

    def close(self) -> None:
        """Nothing may be under way."""
        self._threads.shutdown(wait=True)
        for idle in self._idle.values():
            while idle:
                idle.pop().close()

    async def _connect(self, place: tuple[str, int]) -> http.client.HTTPConnection:
        loop = asyncio.get_running_loop()
        host, port = place
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                connected = await _first(addresses)
        except OSError as error:
            raise Declined from error  # the usual client has the words for why not
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # While the body comes the kernel itself waits, for a block at a time.
        seconds, rest = divmod(self._options.stall_timeout, 1)
        connected.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6))
        )
        connection = http.client.HTTPConnection(host, port)
        connection.sock = connected
        return connection

    async def _run(self, transfer: _Transfer, path: str, headers: Mapping[str, str]) -> None:
        transfer.connection.sock.settimeout(self._options.first_byte_timeout)
        await to_its_end(
            self._threads, lambda: transfer.run(path, headers, self._block()), cancel=transfer.cancel
        )

    def _block(self) -> memoryview:
        """This thread's block, in one huge page."""
        block: memoryview | None = getattr(self._memory, "block", None)
        if block is None:
            pages = mmap.mmap(-1, 2 * BLOCK)
            pages.madvise(mmap.MADV_HUGEPAGE)
            block = self._memory.block = memoryview(pages)[:BLOCK]
        return block


async def _first(addresses: Sequence[tuple[Any, ...]]) -> socket.socket:
    """A connection to the first address that takes one."""
    failed: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed or OSError("the name has no address")


class _Transfer:
    """One request and its body, in a thread."""

    def __init__(
        self, connection: http.client.HTTPConnection, start: int, stop: int, accept: Accept, put: Put
    ) -> None:
        self.connection = connection
        self.reusable = False
        self._start, self._stop = start, stop
        self._accept, self._put = accept, put

    def cancel(self) -> None:
        """End the reading soon, whatever it waits for."""
        with contextlib.suppress(OSError):  # the other side was quicker
            self.connection.sock.shutdown(socket.SHUT_RDWR)

    def run(self, path: str, headers: Mapping[str, str], block: memoryview) -> None:
        sock = self.connection.sock
        try:
            self.connection.request("GET", path, headers=dict(headers))
            answer = self.connection.getresponse()
        except (ConnectionError, http.client.BadStatusLine) as error:
            raise _Stale from error
        with contextlib.closing(answer):
            self._check(answer)
            # What came with the headers is in the answer's own buffer, the rest is still the socket's.
            first = answer.read1(min(self._stop - self._start, _IN_HAND))
            if not first:
                raise http.client.IncompleteRead(b"")
            sock.settimeout(None)
            self._receive(sock, block, first)
            self.reusable = not answer.will_close

    def _check(self, answer: http.client.HTTPResponse) -> None:
        if answer.status >= 400:
            body = answer.read(_ERROR_BODY)
            raise _Refused(answer.status, dict(answer.headers.items()), body.decode(errors="replace"))
        asked = f"bytes {self._start}-{self._stop - 1}/"
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(asked):
            raise Declined
        if answer.length != self._stop - self._start:
            raise Declined
        self._accept(answer.headers)

    def _receive(self, sock: socket.socket, block: memoryview, first: bytes) -> None:
        position, have = self._start, len(first)
        block[:have] = first
        while position < self._stop:
            want = min(self._stop - position, BLOCK - position % BLOCK)
            while have < want:
                have += _fill(sock, block[have:want])
            self._put(block[:want])
            have -= want
            if have:
                block[:have] = bytes(block[want : want + have])
            position += want


def _fill(sock: socket.socket, memory: memoryview) -> int:
    """As many bytes as come before the connection is silent for too long, or all.

    Raises:
        TimeoutError: none came.
        IncompleteRead: the server, or `cancel`, closed the connection.
    """
    try:
        count = sock.recv_into(memory, 0, socket.MSG_WAITALL)
    except BlockingIOError as error:  # how SO_RCVTIMEO shows
        raise TimeoutError from error
    if not count:
        raise http.client.IncompleteRead(b"")
    return count
