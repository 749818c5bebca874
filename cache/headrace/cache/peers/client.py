"""The peer client: chunks, digests, maps and manifests of other nodes.

Connections are kept and used again. A body goes from the socket into a block of its thread and from there to who
takes it, as from an origin (`origins/wire`); nothing that comes is believed before its digest was compared, which is
the caller's part.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.cache.bandwidth import Class
from headrace.cache.digest import ALGORITHMS, digest_size
from headrace.cache.errors import ClusterError, NotAuthenticated, PeerBusy, PeerError, PeerMissing
from headrace.cache.manifest import MAX_BYTES
from headrace.cache.peers import tokens
from headrace.cache.peers.message import Closed, Head, read_head, write_head
from headrace.cache.peers.protocol import (
    ALGORITHM_HEADER,
    CLASS_HEADER,
    MAX_SENTENCE,
    QUEUE_HEADER,
    VERSION,
    VERSION_HEADER,
    WAIT_HEADER,
    Ask,
    check_version,
)
from headrace.cache.peers.security import Secret, Security
from headrace.cache.receiving import BLOCK, Blocks, Put, connect, receive
from headrace.cache.threads import to_its_end
from headrace.cache.tracker.protocol import Peer

_MOST_IDLE = 64
_MOST_WAIT = 60.0
_AGAIN = 1.0  # seconds between two looks whether the secrets were changed


@dataclass(frozen=True, slots=True)
class PeerTimeouts:
    """Seconds.

    Attributes:
        connect: until a connection stands, its TLS handshake included.
        first_byte: until an answer begins.
        stall: between bytes.
        idle: that a connection is kept for the next request.
    """

    connect: float = 2.0
    first_byte: float = 5.0
    stall: float = 5.0
    idle: float = 15.0


class _Stale(Exception):
    """A connection that rested was closed meanwhile."""


class _Connection:
    """One connection to a peer; used by one request at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.used = time.monotonic()

    def cut(self) -> None:
        """End what is under way, from another thread."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which would let what is encrypted pass for what is not.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class PeerClient:
    """Asks other nodes; used from one event loop. `close` it.

    Args:
        connections: requests at once, at most; more wait.
        again: reads the secrets once more, which a long run needs when they are changed: asked when another node
            refuses those in use. Raises NotAuthenticated.
    """

    def __init__(
        self,
        security: Security | None = None,
        *,
        timeouts: PeerTimeouts | None = None,
        connections: int = 64,
        again: Callable[[], Security] | None = None,
    ) -> None:
        self._again = again
        self._again_at = float("-inf")
        self._security = security or Security()
        self._timeouts = timeouts or PeerTimeouts()
        self._context = self._security.client_context()
        self._threads = ThreadPoolExecutor(connections, "headrace-peer-client")
        self._blocks = Blocks()
        self._idle: OrderedDict[_Connection, str] = OrderedDict()

    async def read_to(
        self,
        peer: Peer,
        domain: str,
        object_id: str,
        first: int,
        last: int,
        length: int,
        put: Put,
        pool: Executor | None = None,
        *,
        demand: bool = True,
    ) -> int:
        """Bring the chunks [first, last) of an object to `put`, in order, in blocks of at most `BLOCK`.

        They are not yet verified. Cancelled, it returns when nothing is put any more.

        Args:
            length: bytes of these chunks; an answer of another length is an error.
            put: called in a thread; what it raises ends the reading.
            pool: not used: a peer that stalls would keep one of its few threads.
            demand: whether somebody waits for it; else what demand leaves is enough.

        Returns:
            how many uploads the peer had under way.

        Raises:
            PeerBusy: no upload slot is free there.
            PeerMissing: it does not have them (all).
            NotAuthenticated: it does not accept this node, or this node not it.
            PeerError: it failed, was cut off or too slow, or answered with something else.
        """
        ask = Ask("chunks", domain, object_id, first, last)
        of: Class = "demand" if demand else "prestage"

        def body(sock: socket.socket, head: Head, rest: bytes) -> None:
            if head.length() != length:
                raise PeerError(f"the peer {peer.address} sent {head.length()} bytes instead of {length}.")
            if len(rest) > length:
                raise PeerError(f"the peer {peer.address} sent more than it said.")
            receive(sock, self._blocks.mine(), rest, 0, length, put)

        return _queue(await self._request(peer, ask, body, of))

    async def digests(self, peer: Peer, domain: str, object_id: str, first: int, last: int) -> list[bytes]:
        """The learned digests of the chunks [first, last).

        Raises: as `read_to`; PeerMissing also where it does not know them.
        """
        head, body = await self._small(
            peer, Ask("digests", domain, object_id, first, last), 32 * (last - first)
        )
        algorithm = head.headers.get(ALGORITHM_HEADER.lower(), "")
        width = digest_size(algorithm) if algorithm in ALGORITHMS else 0
        if not width or len(body) != width * (last - first):
            raise PeerError(f"the peer {peer.address} sent digests of another kind or number.")
        return [body[at : at + width] for at in range(0, len(body), width)]

    async def held(self, peer: Peer, domain: str, snapshot_id: str, chunks: int) -> bytes:
        """What a peer has of a snapshot: a packed bitmap over its chunks (see `Numbering`).

        Raises: as `read_to`.
        """
        _, body = await self._small(peer, Ask("held", domain, snapshot_id), -(-chunks // 8))
        if len(body) != -(-chunks // 8):
            raise PeerError(f"the peer {peer.address} numbers the snapshot's chunks in another way.")
        return body

    async def manifest(self, peer: Peer, domain: str, snapshot_id: str) -> bytes:
        """A manifest in its stored form, not yet parsed.

        Raises: as `read_to`.
        """
        return (await self._small(peer, Ask("manifest", domain, snapshot_id), MAX_BYTES))[1]

    async def ping(self, peer: Peer) -> bytes:
        """Whether a peer is there and accepts this node: JSON with its version, node id and time.

        Raises: as `read_to`.
        """
        return (await self._small(peer, Ask("ping"), MAX_SENTENCE))[1]

    def reload(self, security: Security) -> None:
        """Use other secrets or certificates from the next request on.

        Raises:
            NotAuthenticated: a TLS file is missing or wrong.
        """
        self._context = security.client_context()
        self._security = security
        self._close_idle()

    async def close(self) -> None:
        """Nothing may be under way."""
        self._close_idle()
        await asyncio.to_thread(self._threads.shutdown)

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.popitem()[0].close()

    # -- one request

    async def _small(self, peer: Peer, ask: Ask, most: int) -> tuple[Head, bytes]:
        found = bytearray()

        def body(sock: socket.socket, head: Head, rest: bytes) -> None:
            length = head.length()
            if length > most or len(rest) > length:
                raise PeerError(f"the peer {peer.address} sent {length} bytes where at most {most} can be.")
            receive(sock, self._blocks.mine(), rest, 0, length, found.extend)

        return await self._request(peer, ask, body), bytes(found)

    async def _request(
        self,
        peer: Peer,
        ask: Ask,
        body: Callable[[socket.socket, Head, bytes], None],
        of: Class = "demand",
    ) -> Head:
        while True:
            rested = self._rested(peer.address)
            connection = rested or await self._connect(peer)
            exchange = _Exchange(connection, peer.address, self._timeouts, self._security, body)
            try:
                return await to_its_end(self._threads, exchange.run, ask, of, cancel=connection.cut)
            except _Stale:
                if rested is None:
                    raise PeerError(
                        f"the peer {peer.address} closed the connection without an answer."
                    ) from None
                # A peer may close a connection that rests.
            except NotAuthenticated:
                if not self._renewed(exchange.security):
                    raise
            except TimeoutError:
                raise PeerError(f"the peer {peer.address} sent nothing for too long.") from None
            except ssl.SSLError as error:
                raise _tls(peer.address, error) from None
            except (http.client.IncompleteRead, ConnectionError):
                raise PeerError(f"the connection to the peer {peer.address} was cut midway.") from None
            finally:
                if exchange.reusable:
                    self._keep(connection, peer.address)
                else:
                    connection.close()

    def _renewed(self, refused: Security) -> bool:
        """Whether there are other secrets by now than those that were refused."""
        now = time.monotonic()
        if self._again is not None and self._security is refused and now >= self._again_at:
            self._again_at = now + _AGAIN
            # A file that is wrong, or just being written, changes nothing.
            with contextlib.suppress(NotAuthenticated):
                found = self._again()
                if found.secrets != refused.secrets:
                    self.reload(found)
        return self._security is not refused

    def _rested(self, address: str) -> _Connection | None:
        now = time.monotonic()
        while self._idle and now - next(iter(self._idle)).used > self._timeouts.idle:
            self._idle.popitem(last=False)[0].close()
        # The one used last: the others may rest until they are closed.
        found = next((c for c, at in reversed(self._idle.items()) if at == address), None)
        if found is not None:
            del self._idle[found]
        return found

    def _keep(self, connection: _Connection, address: str) -> None:
        connection.used = time.monotonic()
        self._idle[connection] = address
        if len(self._idle) > _MOST_IDLE:
            self._idle.popitem(last=False)[0].close()

    async def _connect(self, peer: Peer) -> _Connection:
        try:
            parts = urlsplit(f"//{peer.address}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or not port:
            raise PeerError(f"{peer.address!r} is not the address of a peer: it has to be host:port.")
        timeouts = self._timeouts
        try:
            sock = await connect(host, port, timeouts.connect, timeouts.stall)
        except TimeoutError:
            raise PeerError(f"the peer {peer.address} does not answer.") from None
        except OSError as error:
            # asyncio's own text quotes the call instead of the reason.
            named = isinstance(error, socket.gaierror) or not error.errno
            why = (error.strerror or str(error)) if named else os.strerror(error.errno or 0).lower()
            raise PeerError(f"the peer {peer.address} cannot be reached: {why}.") from None
        if self._context is None:
            return _Connection(sock)
        sock.settimeout(timeouts.connect)
        tls = self._context.wrap_socket(sock, do_handshake_on_connect=False)
        connection = _Connection(tls)
        try:
            await to_its_end(self._threads, tls.do_handshake, cancel=connection.cut)
        except ssl.SSLError as error:
            connection.close()
            raise _tls(peer.address, error) from None
        except OSError:
            connection.close()
            raise PeerError(f"the peer {peer.address} did not finish the TLS handshake.") from None
        except BaseException:
            connection.close()
            raise
        return connection


class _Exchange:
    """One request and its answer, in a thread."""

    def __init__(
        self,
        connection: _Connection,
        address: str,
        timeouts: PeerTimeouts,
        security: Security,
        body: Callable[[socket.socket, Head, bytes], None],
    ) -> None:
        self.reusable = False
        self._sock = connection.sock
        self._address = address
        self._timeouts = timeouts
        self.security = security
        self._body = body

    def run(self, ask: Ask, of: Class) -> Head:
        sock, path = self._sock, ask.path
        headers = {"Host": self._address, VERSION_HEADER: VERSION, CLASS_HEADER: of}
        secret = self._secret(ask)
        if secret is not None:
            headers["Authorization"] = tokens.make(secret, "GET", self._address, path, time.time())
        sock.settimeout(self._timeouts.first_byte)
        try:
            sock.sendall(write_head(f"GET {path} HTTP/1.1", headers))
            head, rest = read_head(sock, b"", self._timeouts.first_byte)
        except (Closed, ConnectionError) as error:
            raise _Stale from error
        sock.settimeout(self._timeouts.stall if isinstance(sock, ssl.SSLSocket) else None)
        check_version(head.headers.get(VERSION_HEADER.lower()))
        if head.first[1] != "200":
            self._refused(head, rest)
        self._body(sock, head, rest)
        self.reusable = not head.closes
        return head

    def _secret(self, ask: Ask) -> Secret | None:
        return self.security.signing(ask.domain) if ask.domain else self.security.any_signing()

    def _refused(self, head: Head, rest: bytes) -> None:
        """Raise what an answer that is no success means."""
        length = head.length()
        said = bytearray()
        if length <= MAX_SENTENCE and len(rest) <= length:
            receive(self._sock, memoryview(bytearray(BLOCK)), rest, 0, length, said.extend)
            self.reusable = not head.closes
        sentence = "".join(c for c in said.decode(errors="replace") if c.isprintable())
        where = f"the peer {self._address}"
        kinds: dict[str, type[ClusterError]] = {
            "401": NotAuthenticated,
            "403": NotAuthenticated,
            "404": PeerMissing,
        }
        if head.first[1] == "503":
            raise PeerBusy(f"{where}: {sentence}", _seconds(head), _queue(head))
        raise kinds.get(head.first[1], PeerError)(f"{where} answered {head.first[1]}: {sentence}")


def _queue(head: Head) -> int:
    text = head.headers.get(QUEUE_HEADER.lower(), "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0


def _seconds(head: Head) -> float:
    for name in (WAIT_HEADER, "Retry-After"):
        with contextlib.suppress(ValueError):
            seconds = float(head.headers.get(name.lower(), ""))
            if 0 <= seconds <= _MOST_WAIT:
                return seconds
    return 1.0


def _tls(address: str, error: ssl.SSLError) -> NotAuthenticated:
    reason = (error.reason or "no reason given").replace("_", " ").lower()
    return NotAuthenticated(
        f"no mutual TLS with the peer {address} ({reason}): both nodes need certificates by the same authority."
    )
