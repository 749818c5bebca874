"""The peer server: gives this node's verified chunks to other nodes, over HTTP/1.1.

A thread for each connection, and the kernel sends from the page cache (`sendfile`). It keeps no state: what it
gives is what the store has at that moment (see `opened`), so after a crash there is nothing to mend.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.cache.bandwidth import Bandwidth, Class
from headrace.cache.errors import UsageError
from headrace.cache.peers.connection import Connection
from headrace.cache.peers.security import Security
from headrace.cache.peers.serving import ServerLimits, Serving
from headrace.cache.store import Store

_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class PeerStats:
    """What a server has done since it started.

    Attributes:
        sent: bytes of chunks by class.
        uploads: requests for chunks that were answered whole, by class.
        active: uploads under way by class.
        busy: requests refused because no slot was free, or their class is paused.
        refused: requests refused because of their token, and connections because of their certificate.
        connections: open now.
    """

    sent: Mapping[Class, int] = field(default_factory=dict)
    uploads: Mapping[Class, int] = field(default_factory=dict)
    active: Mapping[Class, int] = field(default_factory=dict)
    busy: int = 0
    refused: int = 0
    connections: int = 0


class PeerServer:
    """Serves one store. `start`, then `stop`; a context manager does both.

    Args:
        store: read only.
        security: what is demanded of who asks.
        listen: host and port; port 0 takes a free one.
        slots: uploads at once (see `Slots`).
        bandwidth: its rates for `peers` bound the uploads.
        node: this node's id, for `ping`.
        names: the "host:port" by which others know this node. With them a token for another node is refused.
    """

    def __init__(
        self,
        store: Store,
        security: Security | None = None,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        slots: int = 8,
        bandwidth: Bandwidth | None = None,
        node: str = "",
        names: Sequence[str] = (),
        limits: ServerLimits | None = None,
    ) -> None:
        self._listen = listen
        self._limits = limits or ServerLimits()
        self._serving = Serving(
            store, security or Security(), slots, bandwidth or Bandwidth(), node, tuple(names), self._limits
        )
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._socket: socket.socket | None = None
        self._context: ssl.SSLContext | None = None
        self._accepting: threading.Thread | None = None

    @property
    def address(self) -> str:
        """The "host:port" it listens on."""
        assert self._socket is not None, "not started"
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Listen, and answer from threads of its own.

        Raises:
            NotAuthenticated: beyond loopback without a secret or certificates.
            UsageError: an address that cannot be listened on.
        """
        host, port = self._listen
        self._serving.security.check_listen(host)
        self._context = self._serving.security.server_context()
        self._socket = _listening(host, port)
        self._accepting = threading.Thread(target=self._accept, name="headrace-peers", daemon=True)
        self._accepting.start()

    def reload(self, security: Security) -> None:
        """Use other secrets or certificates from now on; what is under way goes on.

        Raises:
            NotAuthenticated: nothing is demanded any more, on an address beyond loopback; or a TLS file is wrong.
        """
        security.check_listen(self._listen[0])
        self._context = security.server_context()
        self._serving.security = security
        # Who was let in by an older certificate is asked again.
        self._serving.reloaded += 1
        self._end(idle_only=True)

    def stats(self) -> PeerStats:
        counts = self._serving.counts
        slots = self._serving.slots
        with counts.lock:
            return PeerStats(
                dict(counts.sent),
                dict(counts.uploads),
                {of: slots.busy(of) for of in counts.sent},
                counts.busy,
                counts.refused,
                len(self._connections),
            )

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Listen no more, refuse new requests, let uploads end for so long, then cut them."""
        if self._socket is None or self._accepting is None:
            return
        self._serving.draining = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._accepting.join()
        self._socket.close()
        self._socket = None
        self._end(idle_only=True)
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            while self._connections and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
        self._end(idle_only=False)
        for thread in list(self._threads):
            thread.join()
        self._serving.objects.close()

    def __enter__(self) -> PeerServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end(self, *, idle_only: bool) -> None:
        with self._changed:
            for connection in self._connections:
                if connection.idle or not idle_only:
                    connection.cut()

    def _accept(self) -> None:
        assert self._socket is not None
        while not self._serving.draining:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.1)  # until others give some back
                    continue
                if error.errno in (errno.ECONNABORTED, errno.EPROTO, errno.EPERM):
                    continue
                return
            if len(self._connections) >= self._limits.connections or self._serving.draining:
                sock.close()
                continue
            connection = Connection(self._serving, sock, self._context)
            thread = threading.Thread(target=self._run, args=(connection,), name="headrace-peer", daemon=True)
            with self._changed:
                self._connections.add(connection)
                self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads on this machine
                self._forget(connection, thread)

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._forget(connection, threading.current_thread())

    def _forget(self, connection: Connection, thread: threading.Thread) -> None:
        with self._changed:
            connection.close()
            self._connections.discard(connection)
            self._threads.discard(thread)
            self._changed.notify_all()


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"the peer server cannot listen on {host}:{port}: ports go up to 65535.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock
    except (OSError, OverflowError, UnicodeError) as error:
        why = {
            errno.EADDRINUSE: "another program listens there: choose another port",
            errno.EADDRNOTAVAIL: "it is not an address of this machine",
            errno.EACCES: "this user may not: choose a port above 1023",
        }.get(getattr(error, "errno", None) or 0, "it is not an address that can be listened on")
        raise UsageError(f"the peer server cannot listen on {host}:{port}: {why}.") from None
