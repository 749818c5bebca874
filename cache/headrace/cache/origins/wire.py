"""Ranges over plain HTTP, from the socket into memory that is used again and again.

The cheapest way from an origin to a file: the kernel fills a block that stays in the processor's cache
while it is hashed and written, where a client library makes each body a fresh buffer (from nginx, with
hashing: 0.70 against 0.98 CPU s/GB of bare obstore without). It takes only the answer it hopes for, a 206
with the very range and version, and understands refusals; whatever else a server says is left to the adapter's
usual client, and with it TLS, proxies and redirects.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from headrace.cache.errors import OriginUnavailable
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.receiving import Blocks, Put, connect, receive
from headrace.cache.threads import to_its_end

_ERROR_BODY = 64 << 10
_IN_HAND = 8192  # what reading the headers may have taken of the body

Accept = Callable[[http.client.HTTPMessage], None]
"""Looks at the headers of an answer."""


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
        self._blocks = Blocks()

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
        host, port = place
        options = self._options
        try:
            connected = await connect(host, port, options.connect_timeout, options.stall_timeout)
        except OSError as error:
            raise Declined from error  # the usual client has the words for why not
        connection = http.client.HTTPConnection(host, port)
        connection.sock = connected
        return connection

    async def _run(self, transfer: _Transfer, path: str, headers: Mapping[str, str]) -> None:
        transfer.connection.sock.settimeout(self._options.first_byte_timeout)
        await to_its_end(
            self._threads, lambda: transfer.run(path, headers, self._blocks.mine()), cancel=transfer.cancel
        )


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
            receive(sock, block, first, self._start, self._stop, self._put)
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
