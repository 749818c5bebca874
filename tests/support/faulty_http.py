"""The sockets of a faulty server: connections, requests, and answers cut short where a fault says so."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import os
import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections.abc import Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support.served import INVERT, Fault, Pace, Request, Served


class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 256
    daemon_threads = False

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[Handler],
        owner: Served,
        tls: tuple[str, str] | None,
    ) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        super().__init__(address, handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        connection: socket.socket = request
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except (ssl.SSLError, OSError):  # the client does not trust us: its business, and a test's
                request.close()
                return
        with self._guard:
            self._open.add(connection)
        try:
            super().process_request_thread(connection, client_address)
        finally:
            with self._guard:
                self._open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients hang up; that is no news
            super().handle_error(request, client_address)

    @property
    def connections(self) -> int:
        """How many are open now."""
        with self._guard:
            return len(self._open)

    def close_connections(self) -> None:
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Hangup(Exception):
    """The connection ends here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener
    _connections = iter(range(1 << 62))

    def setup(self) -> None:
        super().setup()
        self.number = next(self._connections)
        owner = self.server.owner
        self.own_pace = Pace(owner.connection_rate, owner.stopping) if owner.connection_rate else None

    def log_message(self, format: str, *args: object) -> None:
        """The log is `FaultyServer.log`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        owner = self.server.owner
        split = urlsplit(self.path)
        path = unquote(split.path).lstrip("/")
        if path == "-/log":
            rows = [dataclasses.asdict(r) for r in owner.requests("*")]
            self._plain(200, json.dumps(rows).encode(), {"content-type": "application/json"})
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        for key in parse_qs(split.query).get("X-Amz-Credential", ()):  # a signed URL: the same as the header
            headers["authorization"] = f"Credential={key}"
        owner.busy(+1)
        faults = owner.matching(self.command, path, headers)
        answer = _Answer(self, owner, path, headers, {f.kind: f for f in faults})
        try:
            answer.send()
        except (_Hangup, OSError):
            self.close_connection = True
        finally:
            owner.note(
                Request(
                    method=self.command,
                    path=path,
                    range=headers.get("range"),
                    status=answer.status,
                    start=answer.start,
                    stop=answer.start + answer.sent,
                    faults=tuple(f.kind for f in faults),
                    connection=self.number,
                    headers=headers,
                )
            )
            owner.busy(-1)

    def _plain(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Answer:
    """One answer: decided by the content and the faults, sent slice by slice."""

    def __init__(
        self,
        handler: Handler,
        owner: Served,
        path: str,
        headers: Mapping[str, str],
        faults: Mapping[str, Fault],
    ) -> None:
        self.handler, self.owner, self.path = handler, owner, path
        self.headers, self.faults = headers, faults
        self.status, self.start, self.sent = 0, 0, 0

    def plain(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status = status
        self.handler._plain(status, body, headers)

    def send(self) -> None:
        faults, owner = self.faults, self.owner
        if (fault := faults.get("latency")) is not None:
            owner.stopping.wait(fault.seconds)
        if (fault := faults.get("replace")) is not None:
            owner.files[self.path] = self._replacement(fault)
        if (fault := faults.get("status")) is not None:
            extra = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
            self.plain(fault.status, fault.body or b"", extra)
            return
        if (fault := faults.get("stall")) is not None and fault.after < 0:
            self._stall(fault)
        if (fault := faults.get("reset")) is not None and fault.after < 0:
            self._reset()
        content = owner.find(self.path)
        if content is None:
            self._page()
            return
        etag = owner.etag(self.path, content)
        expected = self.headers.get("if-match", "*").strip('"')
        if owner.honours_if_match and expected not in ("*", etag):
            self.plain(412, b"", {})
            return
        self._body(content, etag)

    def _replacement(self, fault: Fault) -> bytes:
        if fault.body is not None:
            return fault.body
        old = self.owner.find(self.path)
        return (old.read_bytes() if isinstance(old, Path) else old or b"").translate(INVERT)

    def _page(self) -> None:
        links = self.owner.links(self.path) if self.owner.index else None
        if self.path and not self.path.endswith("/"):
            if self.owner.index and self.owner.links(self.path + "/"):
                self.plain(301, b"", {"location": f"/{quote(self.path)}/"})
            else:
                self.plain(404, b"not found", {})
            return
        if links is None:
            self.plain(404, b"not found", {})
            return
        rows = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in links)
        page = f"<html><title>Index of /{html.escape(self.path)}</title><pre>{rows}</pre></html>".encode()
        self.plain(200, page, {"content-type": "text/html; charset=utf-8"})

    def _body(self, content: bytes | Path, etag: str) -> None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start, stop, ranged = 0, size, False
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", ""))
        if match and (match[1] or match[2]) and "ignore_range" not in self.faults:
            ranged = True
            if match[1]:
                start, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
            else:
                start = max(0, size - int(match[2]))
            if start >= size or start >= stop:
                self.plain(416, b"", {"content-range": f"bytes */{size}"})
                return
        if "wrong_range" in self.faults and ranged:
            start, stop = start + 1, min(size, stop + 1)
        if "long_body" in self.faults and ranged:
            stop = min(size, stop + self.faults["long_body"].after)
        self.status, self.start = (206 if ranged else 200), start
        extra = self.faults["wrong_length"].after if "wrong_length" in self.faults else 0
        handler = self.handler
        handler.send_response(self.status)
        handler.send_header("content-length", str(stop - start + extra))
        handler.send_header("content-type", "application/octet-stream")
        handler.send_header("accept-ranges", "bytes")
        if "no_etag" not in self.faults:
            handler.send_header("etag", f'"{etag}"')
            stamp = content.stat().st_mtime if isinstance(content, Path) else 0
            handler.send_header("last-modified", formatdate(stamp, usegmt=True))
        if ranged:
            handler.send_header("content-range", f"bytes {start}-{stop - 1}/{size}")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if isinstance(content, Path):
            with content.open("rb") as file:
                self._pieces(file.fileno(), start, stop)
        else:
            self._pieces(memoryview(content), start, stop)
        if extra:
            raise _Hangup

    def _pieces(self, source: int | memoryview, start: int, stop: int) -> None:
        """Send [start, stop) of `source`, stopping where a fault says so."""
        cuts = {
            kind: min(stop, start + self.faults[kind].after)
            for kind in ("reset", "truncate", "stall")
            if kind in self.faults and self.faults[kind].after >= 0
        }
        paces = [p for p in (self.owner.pace, self.handler.own_pace) if p is not None]
        if "throttle" in self.faults:
            paces.append(Pace(self.faults["throttle"].rate, self.owner.stopping))
        step = min([p.slice for p in paces], default=1 << 22)
        at = start
        while True:
            for kind in [k for k, cut in cuts.items() if cut == at]:
                del cuts[kind]
                if kind == "stall":
                    self._stall(self.faults["stall"])
                elif kind == "reset":
                    self._reset()
                else:
                    raise _Hangup
            if at >= stop or self.owner.stopping.is_set():
                return
            end = min([at + step, stop, *cuts.values()])
            for pace in paces:
                pace.take(end - at)
            at += self._piece(source, at, end)

    def _piece(self, source: int | memoryview, at: int, end: int) -> int:
        connection = self.handler.connection
        bad = self.faults.get("corrupt")
        touched = bad is not None and bad.at < end and at < bad.at + bad.length
        if isinstance(source, int) and not touched and not isinstance(connection, ssl.SSLSocket):
            self.handler.wfile.flush()
            count = os.sendfile(connection.fileno(), source, at, end - at)
            if count == 0:
                raise _Hangup  # the file became shorter
        else:
            data = os.pread(source, end - at, at) if isinstance(source, int) else source[at:end]
            if touched and bad is not None:
                changed = bytearray(data)
                low, high = max(at, bad.at) - at, min(end, bad.at + bad.length) - at
                changed[low:high] = changed[low:high].translate(INVERT)
                data = bytes(changed)
            connection.sendall(data)
            count = len(data)
        self.sent += count
        return count

    def _stall(self, fault: Fault) -> None:
        self.owner.busy(-1)
        self.owner.stopping.wait(fault.seconds)
        self.owner.busy(+1)
        if self.owner.stopping.is_set():
            raise _Hangup

    def _reset(self) -> None:
        connection = self.handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(connection.detach())  # at once: a shutdown first would end it politely
        raise _Hangup
