"""An HTTP server whose faults are data.

It serves files (from memory or a directory) over real sockets with ranges, ETag and If-Match, an
index page per directory, and keeps a log of every request and of every body byte it sent::

    faults = [
        Fault("status", status=503, retry_after=0.01, first=2),          # the first two GETs
        Fault("truncate", path="*.safetensors", after=1000, nth=3),      # the third GET of a shard
        Fault("corrupt", path="model/a.bin", at=4096),                   # byte 4096, every time
        Fault("stall", after=65536, seconds=30, probability=0.1),
        Fault("status", status=403, header=("authorization", "*OLDKEY*")),
    ]
    with FaultyServer({"model/a.bin": data}, faults=faults) as server:
        fetch(server.url + "/model/a.bin")
        assert server.multiplicity("model/a.bin") == {1: len(data)}      # each byte sent once

Kinds of fault (`Fault.kind`), with the fields that they use:

=============== ==================================================================================
status          answer `status` with `body` and, where given, `retry_after`
reset           send `after` bytes of the body, then reset the connection; -1: before any answer
truncate        send `after` bytes of the body, then close as if that were all of it
stall           send `after` bytes of the body, then nothing for `seconds`; -1: before the headers
latency         wait `seconds` before answering
throttle        this answer's body at `rate` bytes per second
wrong_range     a Content-Range that starts one byte later than asked, with that range's bytes
wrong_length    a Content-Length `after` bytes longer than the body
ignore_range    200 with the whole file for a ranged request
long_body       a 206 whose body, length and Content-Range go `after` bytes past what was asked
replace         before answering, the file becomes `body` (default: every byte inverted)
corrupt         the `length` bytes at file offset `at` arrive inverted
no_etag         neither ETag nor Last-Modified
=============== ==================================================================================

A fault applies to the requests that match `path`, `methods` and `header`; of those to the first
`first`, the `nth` (1-based), each with `probability` (seeded), or all.

Also a program, for another process: `python -m support.faulty_server --dir D --port 0 --rate N
--connection-rate N --faults '[{"kind": "status", "status": 503, "first": 1}]'` prints its URL; its
log is at /-/log (JSON). `spawn` starts that and returns when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import hashlib
import html
import json
import os
import random
import re
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

KINDS = frozenset(
    {"status", "reset", "truncate", "stall", "latency", "throttle", "wrong_range", "wrong_length"}
    | {"ignore_range", "long_body", "replace", "corrupt", "no_etag"}
)
_INVERT = bytes(255 - i for i in range(256))
_SLICE = 1 << 18


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; see the module's table. `after`, `at`, `length` in bytes, `seconds`, `rate` in bytes/s."""

    kind: str
    path: str = "*"
    methods: tuple[str, ...] = ("GET",)
    header: tuple[str, str] | None = None
    first: int | None = None
    nth: int | None = None
    probability: float | None = None
    status: int = 500
    body: bytes | None = None
    retry_after: float | None = None
    after: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    at: int = 0
    length: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such fault: {self.kind}")


@dataclass(frozen=True, slots=True)
class Request:
    """One answered request: `start`, `stop` are the file bytes of the body that was sent."""

    method: str
    path: str
    range: str | None
    status: int
    start: int
    stop: int
    faults: tuple[str, ...]
    connection: int
    headers: Mapping[str, str]

    @property
    def sent(self) -> int:
        return self.stop - self.start


class _Pace:
    """Spreads bytes over time: `take(n)` returns when n more bytes may have been sent."""

    def __init__(self, rate: float, stopping: threading.Event) -> None:
        self.rate = rate
        self._stopping = stopping
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def slice(self) -> int:
        return max(1024, min(_SLICE, int(self.rate / 50)))

    def take(self, size: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - 0.02) + size / self.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            self._stopping.wait(wait)


class FaultyServer:
    """Serves `files` (path -> bytes) and, below them, `directory`, on 127.0.0.1, from threads.

    Args:
        files: in-memory files by path without a leading slash; `self.files` may be changed at any time.
        directory: a directory whose files are served (by sendfile where nothing is in the way).
        faults: the faults; `self.faults` may be replaced at any time (counts start anew).
        rate: bytes per second of all connections together; None: as fast as it goes.
        connection_rate: bytes per second of each connection.
        honours_if_match: False answers whatever is there now, as some servers do.
        index: answer a directory's URL with a page of links.
        tls: (certificate file, key file) to speak HTTPS.
        port: 0 takes a free one.
        seed: for faults with a probability.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        faults: Sequence[Fault] = (),
        rate: float | None = None,
        connection_rate: float | None = None,
        honours_if_match: bool = True,
        index: bool = True,
        tls: tuple[str, str] | None = None,
        port: int = 0,
        seed: int = 0,
    ) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self.directory = Path(directory) if directory is not None else None
        self.honours_if_match = honours_if_match
        self.index = index
        self.connection_rate = connection_rate
        self.stopping = threading.Event()
        self.pace = _Pace(rate, self.stopping) if rate else None
        self._log: list[Request] = []
        self._busy = 0
        self._idle = threading.Condition()
        self._faults: tuple[Fault, ...] = tuple(faults)
        self._matched: Counter[int] = Counter()
        self._etags: dict[str, tuple[int, str]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._http = _Listener(("127.0.0.1", port), _Handler, self, tls)
        self.scheme = "https" if tls else "http"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="faulty-server")

    # -- life ----------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close every connection and wait for the threads."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.close_connections()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- content -------------------------------------------------------------------------------

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self._faults

    @faults.setter
    def faults(self, faults: Sequence[Fault]) -> None:
        with self._lock:
            self._faults = tuple(faults)
            self._matched.clear()

    def find(self, path: str) -> bytes | Path | None:
        """What is served at `path`: bytes, a file of the directory, or None."""
        data = self.files.get(path)
        if data is not None:
            return data
        if self.directory is not None:
            file = self.directory / path
            if file.is_file() and file.resolve().is_relative_to(self.directory.resolve()):
                return file
        return None

    def etag(self, path: str, content: bytes | Path) -> str:
        if isinstance(content, Path):
            stat = content.stat()
            return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"
        known = self._etags.get(path)
        if known is None or known[0] != id(content):
            known = (id(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
            self._etags[path] = known
        return known[1]

    def links(self, path: str) -> list[str] | None:
        """The names in the directory `path` ("" or ending in "/"), sub-directories with a slash."""
        names = {
            key[len(path) :].partition("/")[0] + ("/" if "/" in key[len(path) :] else "")
            for key in self.files
            if key.startswith(path)
        }
        if self.directory is not None and (self.directory / path).is_dir():
            names |= {e.name + ("/" if e.is_dir() else "") for e in (self.directory / path).iterdir()}
        return sorted(names) or None

    # -- faults and the log --------------------------------------------------------------------

    def matching(self, method: str, path: str, headers: Mapping[str, str]) -> list[Fault]:
        """The faults of one request; counts it."""
        chosen = []
        with self._lock:
            for number, fault in enumerate(self._faults):
                if method not in fault.methods or not fnmatch.fnmatchcase(path, fault.path):
                    continue
                if fault.header is not None:
                    value = headers.get(fault.header[0].lower())
                    if value is None or not fnmatch.fnmatchcase(value, fault.header[1]):
                        continue
                self._matched[number] += 1
                count = self._matched[number]
                if fault.first is not None and count > fault.first:
                    continue
                if fault.nth is not None and count != fault.nth:
                    continue
                if fault.probability is not None and self._random.random() >= fault.probability:
                    continue
                chosen.append(fault)
        return chosen

    def busy(self, change: int) -> None:
        """A request is being answered (+1), or no longer (-1): it ended, or stalls on purpose."""
        with self._idle:
            self._busy += change
            self._idle.notify_all()

    def note(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    @property
    def log(self) -> list[Request]:
        """Every answered request, in the order in which they ended.

        A client may have its answer a moment before the server's thread has noted it, so this waits
        a little for the requests that are under way.
        """
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, 0.5)
        with self._lock:
            return list(self._log)

    def requests(self, path: str = "*", method: str = "GET") -> list[Request]:
        """The answered requests whose path matches the glob, in the order in which they ended."""
        return [r for r in self.log if r.method == method and fnmatch.fnmatchcase(r.path, path)]

    def bytes_sent(self, path: str = "*") -> int:
        """Body bytes of 200 and 206 answers written to sockets."""
        return sum(r.sent for r in self.requests(path) if r.status in (200, 206))

    def multiplicity(self, path: str) -> dict[int, int]:
        """How often the bytes of one file were sent: {times: bytes}; {1: size} is the ideal."""
        edges: Counter[int] = Counter()
        for request in self.requests(path):
            if request.status in (200, 206) and request.sent:
                edges[request.start] += 1
                edges[request.stop] -= 1
        counts: Counter[int] = Counter()
        depth, last = 0, 0
        for offset in sorted(edges):
            counts[depth] += offset - last
            depth, last = depth + edges[offset], offset
        return {times: size for times, size in counts.items() if times and size}

    def clear(self) -> None:
        """Forget the log."""
        if self.log:
            with self._lock:
                self._log.clear()


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 256
    daemon_threads = False

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[_Handler],
        owner: FaultyServer,
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

    def close_connections(self) -> None:
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Hangup(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener
    _connections = iter(range(1 << 62))

    def setup(self) -> None:
        super().setup()
        self.number = next(self._connections)
        owner = self.server.owner
        self.own_pace = _Pace(owner.connection_rate, owner.stopping) if owner.connection_rate else None

    def log_message(self, format: str, *args: object) -> None:
        """The log is `FaultyServer.log`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        owner = self.server.owner
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path == "-/log":
            rows = [dataclasses.asdict(r) for r in owner.requests("*")]
            self._plain(200, json.dumps(rows).encode(), {"content-type": "application/json"})
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
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
        handler: _Handler,
        owner: FaultyServer,
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
        return (old.read_bytes() if isinstance(old, Path) else old or b"").translate(_INVERT)

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
            paces.append(_Pace(self.faults["throttle"].rate, self.owner.stopping))
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
                changed[low:high] = changed[low:high].translate(_INVERT)
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


# -- in another process ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawned:
    """A server in a child process."""

    url: str
    pid: int

    def log(self) -> list[dict[str, Any]]:
        """The child's log of GET requests: `Request` as dicts."""
        with urllib.request.urlopen(f"{self.url}/-/log") as answer:
            rows: list[dict[str, Any]] = json.load(answer)
        return rows

    def bytes_sent(self) -> int:
        return sum(row["stop"] - row["start"] for row in self.log() if row["status"] in (200, 206))


@contextlib.contextmanager
def spawn(
    directory: str | os.PathLike[str],
    *,
    rate: float | None = None,
    connection_rate: float | None = None,
    faults: Sequence[Fault] = (),
) -> Iterator[Spawned]:
    """Serve `directory` from a child process, so that its CPU and its GIL are its own."""
    command = [sys.executable, "-m", "support.faulty_server", "--dir", os.fspath(directory)]
    command += ["--rate", str(rate or 0), "--connection-rate", str(connection_rate or 0)]
    rows = [{**dataclasses.asdict(f), "body": None if f.body is None else f.body.decode()} for f in faults]
    command += ["--faults", json.dumps(rows)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            if not url:
                raise RuntimeError("the server did not start")
            yield Spawned(url, child.pid)
        finally:
            child.terminate()
            child.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="serve a directory, with faults")
    parser.add_argument("--dir", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0, help="bytes per second, all connections together")
    parser.add_argument(
        "--connection-rate", type=float, default=0, help="bytes per second of each connection"
    )
    parser.add_argument("--faults", default="[]", help="JSON list of faults")
    options = parser.parse_args()
    faults = []
    for row in json.loads(options.faults):
        if row.get("body") is not None:
            row["body"] = row["body"].encode()
        for name in ("methods", "header"):
            if row.get(name) is not None:
                row[name] = tuple(row[name])
        faults.append(Fault(**row))
    server = FaultyServer(
        directory=options.dir,
        faults=faults,
        rate=options.rate or None,
        connection_rate=options.connection_rate or None,
        port=options.port,
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with server:
        print(server.url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
