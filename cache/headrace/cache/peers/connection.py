"""One connection of the peer server: requests in, answers out, until it closes."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus

from headrace.cache.bandwidth import Allowance, Class
from headrace.cache.errors import (
    HeadraceError,
    NotAuthenticated,
    NotStaged,
    PeerBusy,
    PeerError,
    PeerMissing,
)
from headrace.cache.peers import tokens
from headrace.cache.peers.message import Closed, Head, read_head, write_head
from headrace.cache.peers.protocol import (
    ALGORITHM_HEADER,
    CLASS_HEADER,
    QUEUE_HEADER,
    VERSION,
    VERSION_HEADER,
    WAIT_HEADER,
    Ask,
    class_of,
)
from headrace.cache.peers.serving import Serving
from headrace.cache.peers.upload import Upload
from headrace.cache.store import Domain

_OCTETS = "application/octet-stream"


class Connection:
    """Runs in a thread of its own. `idle` while it waits for a request."""

    def __init__(self, serving: Serving, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        self._serving = serving
        self._sock = sock
        self._context = context
        self._since = serving.reloaded
        self.idle = False

    def run(self) -> None:
        """Answer until the other side closes, or does what it should not."""
        with contextlib.suppress(OSError, Closed):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                self._sock.settimeout(self._serving.limits.head)
                # Assigned before the handshake, so that `cut` reaches it.
                tls = self._sock = self._context.wrap_socket(
                    self._sock, server_side=True, do_handshake_on_connect=False
                )
                try:
                    tls.do_handshake()
                except ssl.SSLError:
                    self._count_refused()
                    return
            rest = b""
            while True:
                self._sock.settimeout(self._serving.limits.idle)
                # Idle first: who ends what is idle has said so before it looks, so one of the two sees the other.
                self.idle = True
                if self._serving.draining or self._since != self._serving.reloaded:
                    return
                try:
                    head, rest = read_head(self._sock, rest, self._serving.limits.head)
                except PeerError as error:
                    self._refuse(error, close=True)
                    return
                finally:
                    self.idle = False
                if not self._answer(head):
                    return

    def cut(self) -> None:
        """End it from another thread."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which would let what is encrypted pass for what is not.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    # -- one request

    def _answer(self, head: Head) -> bool:
        """Whether the connection may be used again."""
        serving = self._serving
        self._sock.settimeout(serving.limits.send)
        try:
            if serving.draining:
                raise PeerBusy("this node is shutting down: ask another.", 1.0)
            if head.first[0] != "GET":
                raise PeerError("only GET is understood.")
            ask = Ask.parse(head.first[1])
            self._authenticate(ask, head)
            if ask.what == "chunks":
                return self._upload(ask, class_of(head.headers.get(CLASS_HEADER.lower())), head.closes)
            self._small(ask)
        except NotAuthenticated as error:
            self._count_refused()
            self._refuse(error, close=True)
            return False
        except HeadraceError as error:
            self._refuse(error, close=head.closes)
        except _Failed:
            return False
        except OSError:
            # The disk, or the connection: then this fails too, and ends it.
            self._refuse(PeerError("this node's disk failed."), status=500, close=True)
            return False
        return not head.closes

    def _authenticate(self, ask: Ask, head: Head) -> None:
        security = self._serving.security
        if ask.what == "ping":
            known = tuple(s for found in security.secrets.values() for s in found)
        else:
            known = security.secrets.get(ask.domain, ())
        if not known:
            if security.secrets and security.tls is None:
                raise NotAuthenticated("this node has no secret for the trust domain that is asked for.")
            return
        host = head.headers.get("host", "")
        token = head.headers.get("authorization")
        tokens.check(token, known, head.first[0], host, head.first[1], time.time(), self._serving.replays)
        if self._serving.names and host not in self._serving.names:
            raise NotAuthenticated(
                "the token is for another node's address: check what this one is to be known by."
            )

    def _small(self, ask: Ask) -> None:
        serving = self._serving
        headers = {}
        if ask.what == "ping":
            body = json.dumps({"version": VERSION, "node": serving.node, "time": time.time()}).encode()
        else:
            domain = serving.shelf.domain(ask.domain)
            if ask.what == "held":
                body = serving.shelf.held(domain, ask.id)
            elif ask.what == "manifest":
                body = serving.shelf.manifest(domain, ask.id)
            else:
                body, headers[ALGORITHM_HEADER] = self._digests(domain, ask)
        self._send_head(HTTPStatus.OK, len(body), headers)
        self._sock.sendall(body)

    def _digests(self, domain: Domain, ask: Ask) -> tuple[bytes, str]:
        serving = self._serving
        with serving.objects.use(serving.shelf.folder(domain, ask.id)) as one:
            if not one.ready(ask.first, ask.last):
                raise PeerMissing("this node does not have all of these chunks.")
            return b"".join(one.digests(ask.first, ask.last)), one.algorithm

    def _upload(self, ask: Ask, of: Class, closes: bool) -> bool:
        serving = self._serving
        domain = serving.shelf.domain(ask.domain)
        with serving.objects.use(serving.shelf.folder(domain, ask.id)) as one:
            if not one.ready(ask.first, ask.last):
                raise PeerMissing("this node does not have all of these chunks.")
            if serving.bandwidth.rate("peers", of) == 0:
                raise self._busy(f"uploads of the class {of} are paused on this node.", 1.0)
            slot = serving.slots.take(of, (ask.id, ask.first))
            if slot is None:
                raise self._busy(
                    "all upload slots of this node are taken, or enough nodes are getting this chunk from it.",
                    serving.until_free(),
                )
            whole = False
            try:
                start, stop = one.grid.span(ask.first, ask.last)
                self._send_head(HTTPStatus.OK, stop - start, {})
                upload = Upload(self._sock, one.fileno(), serving.blocks, serving.limits.send)
                allowance = Allowance(serving.bandwidth, of, upload.gone)
                try:
                    # A failed sync or a repair may take chunks back at any time.
                    while start < stop and one.ready(ask.first, ask.last):
                        size = allowance.ask(stop - start)
                        if not size:
                            break
                        sent = upload.send(start, size)
                        allowance.used(sent)
                        serving.counts.add(of, sent)
                        start += sent
                except OSError as error:
                    raise _Failed from error
                if start < stop:
                    return False  # a body that is cut short can only be told from a whole one by its end
                whole = True
                serving.counts.done(of)
                return not closes
            finally:
                serving.slots.give(slot, whole=whole)

    def _busy(self, sentence: str, seconds: float) -> PeerBusy:
        with self._serving.counts.lock:
            self._serving.counts.busy += 1
        return PeerBusy(sentence, seconds)

    def _count_refused(self) -> None:
        with self._serving.counts.lock:
            self._serving.counts.refused += 1

    # -- answers

    def _refuse(self, error: HeadraceError, *, close: bool, status: int = 0) -> None:
        body = str(error).encode()
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if isinstance(error, PeerBusy):
            headers["Retry-After"] = "1"
            headers[WAIT_HEADER] = f"{error.retry_after:.3f}"
        if close:
            headers["Connection"] = "close"
        self._send_head(HTTPStatus(status or _status(error)), len(body), headers, more=False)
        self._sock.sendall(body)

    def _send_head(
        self, status: HTTPStatus, length: int, headers: Mapping[str, str], *, more: bool = True
    ) -> None:
        first = f"HTTP/1.1 {status.value} {status.phrase}"
        common = {
            VERSION_HEADER: VERSION,
            QUEUE_HEADER: str(self._serving.slots.queue),
            "Content-Length": str(length),
        }
        head = write_head(first, {"Content-Type": _OCTETS, **headers, **common})
        if more and length and not isinstance(self._sock, ssl.SSLSocket):
            self._sock.send(head, socket.MSG_MORE)
        else:
            self._sock.sendall(head)


class _Failed(Exception):
    """An upload that ended midway: nothing more can be said on its connection."""


def _status(error: HeadraceError) -> int:
    kinds: tuple[tuple[type[HeadraceError], int], ...] = (
        (NotAuthenticated, 401),
        (PeerMissing, 404),
        (NotStaged, 404),
        (PeerBusy, 503),
        (PeerError, 400),
    )
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)
