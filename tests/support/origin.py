"""The origin of a test cluster: SeaweedFS in a network namespace, and what clients read there, counted there.

In front of it stands nginx, which passes everything through and writes down each request with the body bytes
that it sent: nothing of headrace counts for itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import parse_qs, unquote, urlsplit

from support.namespaces import Node
from support.nginx import BINARY
from support.ports import listening
from support.seaweedfs import SeaweedFS

BUCKET = "models"
_PORT, _STATUS, _START = 80, 81, 20.0
_CONFIG = """
daemon off;
pid {run}/pid;
error_log stderr warn;
worker_processes 1;
user root;
events {{ worker_connections 4096; }}
http {{
  log_format counted '$remote_addr\\t$request_method\\t$status\\t$body_bytes_sent\\t$request_uri';
  access_log {run}/access counted;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
  upstream storage {{ server 127.0.0.1:{storage}; keepalive 64; }}
  server {{
    listen {address}:{port} backlog=1024;
    location / {{
      proxy_pass http://storage;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Connection "";
      proxy_buffers 8 128k;
      proxy_buffer_size 128k;
      proxy_max_temp_file_size 0;
      proxy_read_timeout 600;
    }}
  }}
  server {{ listen 127.0.0.1:{status}; access_log off; location / {{ stub_status; }} }}
}}
"""


@dataclass(frozen=True, slots=True)
class Read:
    """One answered request.

    Attributes:
        client: its address.
        kind: LIST, HEAD, GET, PUT, ...
        path: bucket and key.
        status: of HTTP.
        body: bytes sent to the client, without headers; of an answer that was cut, those before the cut.
    """

    client: str
    kind: str
    path: str
    status: int
    body: int

    @classmethod
    def parse(cls, line: str) -> Self:
        client, method, status, body, uri = line.split("\t")
        url = urlsplit(uri)
        listed = method == "GET" and parse_qs(url.query, keep_blank_values=True).keys() & {
            "list-type",
            "prefix",
        }
        return cls(client, "LIST" if listed else method, unquote(url.path), int(status), int(body))


@dataclass(frozen=True, slots=True)
class Reads:
    """What was read in a stretch of time."""

    all: tuple[Read, ...]

    def body(self, *, client: str | None = None, kinds: Iterable[str] = ("GET",)) -> int:
        """Body bytes of all, or of one client."""
        return sum(r.body for r in self.all if r.kind in kinds and client in (None, r.client))

    def count(self, kind: str) -> int:
        return sum(r.kind == kind for r in self.all)

    def by_client(self) -> Mapping[str, int]:
        found: Counter[str] = Counter()
        for read in self.all:
            found[read.client] += read.body if read.kind == "GET" else 0
        return found

    def by_path(self, kind: str) -> Mapping[str, int]:
        """How many requests of a kind there were for each path."""
        return Counter(r.path for r in self.all if r.kind == kind)


class Origin:
    """An object store at `url`, for every node of the network.

    Args:
        node: its namespace; its rate is the origin's.
        folder: for its data and its log.
    """

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self._run = folder / "nginx"
        self._storage = SeaweedFS(folder / "weed", node)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[str] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.node.address}:{_PORT}"

    @property
    def environ(self) -> dict[str, str]:
        """What its users have in their environment."""
        return {**self._storage.environ, "AWS_ENDPOINT_URL": self.url}

    def start(self) -> Self:
        """Start, with an empty bucket `BUCKET`.

        Raises:
            RuntimeError: a part of it did not start.
        """
        self._run.mkdir(parents=True, exist_ok=True)
        self._storage.start()
        try:
            with self._storage.inside(), contextlib.closing(self._storage.client()) as client:
                client.create_bucket(Bucket=BUCKET)
            self.up()
        except BaseException:
            self.stop()
            raise
        self._log = (self._run / "access").open()
        return self

    def up(self) -> None:
        """Answer again."""
        if BINARY is None:
            raise RuntimeError("nginx is not installed")
        config = self._run / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                run=self._run,
                address=self.node.address,
                port=_PORT,
                storage=self._storage.port,
                status=_STATUS,
            )
        )
        words = self.node.command(BINARY, "-e", "stderr", "-c", config, "-p", self._run)
        with (self._run / "errors").open("ab") as errors:
            self._process = subprocess.Popen(words, stdout=errors, stderr=errors)
        deadline = time.monotonic() + _START
        with self.node.inside():
            while not listening(_STATUS):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"nginx did not start: {(self._run / 'errors').read_text()[-2000:]}")
                time.sleep(0.01)

    def down(self) -> None:
        """Cut what goes on, and refuse connections."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def put(self, files: Mapping[str, bytes] | Path, prefix: str) -> str:
        """Upload files, or a folder's, below a prefix; returns the model reference."""
        with self._storage.inside(), contextlib.closing(self._storage.client()) as client:
            if isinstance(files, Path):
                for path in sorted(p for p in files.rglob("*") if p.is_file()):
                    client.upload_file(os.fspath(path), BUCKET, f"{prefix}/{path.relative_to(files)}")
            else:
                for name, data in files.items():
                    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}"

    def reads(self) -> Reads:
        """What was asked since the last call, once no request is being answered any more."""
        assert self._log is not None
        if self._process is not None:
            self._settle()
        return Reads(tuple(Read.parse(line.rstrip("\n")) for line in self._log))

    def _settle(self) -> None:
        """nginx writes a request down when it has ended: a client may know of the end before."""
        deadline = time.monotonic() + _START
        with self.node.inside():
            while True:
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with opener.open(f"http://127.0.0.1:{_STATUS}/") as answer:
                    words = answer.read().decode().split()
                # "Writing" counts this request, too.
                if int(words[words.index("Writing:") + 1]) <= 1 or time.monotonic() > deadline:
                    return
                time.sleep(0.01)

    def stop(self) -> None:
        self.down()
        self._storage.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
