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
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.faulty_http import Handler, Listener
from support.served import Fault, Request, Served

__all__ = ["Fault", "FaultyServer", "Request", "Spawned", "spawn"]


class FaultyServer(Served):
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
        super().__init__(files, directory, faults, rate, connection_rate, honours_if_match, index, seed)
        self._http = Listener(("127.0.0.1", port), Handler, self, tls)
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

    @property
    def connections(self) -> int:
        """How many connections are open; the log lacks what is under way on them."""
        return self._http.connections

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
