"""A small real HTTP server on loopback that the fakes of object stores build on.

A fake subclasses `HttpService` and implements `answer(request)`. Requests are served by threads, on
keep-alive connections, and kept in `requests` for tests to look at.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self, cast
from urllib.parse import parse_qsl


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent. `path` is as on the wire; `headers` have lower-case names."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HttpService(ABC):
    """Start with `with`, or `start` and `stop`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.service = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @abstractmethod
    def answer(self, request: Request) -> Response:
        """The answer; called with `lock` held."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def count(self, method: str, part: str = "") -> int:
        """How many requests with this method had `part` in their path."""
        return sum(1 for r in self.requests if r.method == method and part in r.path)


def serve_bytes(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """`data`, or the range of it that was asked for; a range past the end is 416."""
    wanted = request.headers.get("range")
    if wanted is None:
        return Response(200, data, headers)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if first:
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
    else:
        start, stop = max(0, len(data) - int(last)), len(data)
    if start >= len(data):
        return Response(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Response(
        206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    service: HttpService

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away midway are part of the tests; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm: ClassVar[bool] = True

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        service = cast(_Server, self.server).service
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.command, path, dict(parse_qsl(query, keep_blank_values=True)), headers, self._body(headers)
        )
        with service.lock:
            service.requests.append(request)
            response = service.answer(request)
        self.send_response(response.status)
        lowered = {name.lower() for name in response.headers}
        if "content-length" not in lowered and response.status != 204:
            self.send_header("Content-Length", str(len(response.body)))
        if "last-modified" not in lowered:
            self.send_header("Last-Modified", formatdate(0, usegmt=True))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" in headers.get("transfer-encoding", ""):
            parts = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(headers.get("content-length", 0)))

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in `HttpService.requests`; nothing goes to standard error."""
