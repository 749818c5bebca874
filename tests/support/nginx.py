"""A real web server for tests and benchmarks: Debian's nginx, with index pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from support.ports import free, listening

BINARY = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

_CONFIG = """
daemon off;
pid {run}/pid;
error_log stderr warn;
worker_processes {workers};
{user}
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  types {{ text/html html; application/json json; }}
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    autoindex on;
    {extra}
  }}
}}
"""


class Nginx:
    """Serves `root` at `url`.

    Args:
        root: the directory that is served.
        run: a directory for its own files.
        workers: processes.
        extra: more lines for the server's configuration, e.g. "limit_rate 50m;".
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        run: str | os.PathLike[str],
        *,
        workers: int = 1,
        extra: str = "",
    ) -> None:
        self.root, self.run = Path(root), Path(run)
        self.workers, self.extra = workers, extra
        self.port = 0
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start and wait until it listens.

        Raises:
            RuntimeError: nginx is not installed, or ended.
        """
        if BINARY is None:
            raise RuntimeError("nginx is not installed")
        self.run.mkdir(parents=True, exist_ok=True)
        self.port = free(1)[0]
        config = self.run / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                run=self.run,
                root=self.root,
                port=self.port,
                workers=self.workers,
                extra=self.extra,
                user="user root;" if os.geteuid() == 0 else "",
            )
        )
        log = self.run / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [BINARY, "-e", "stderr", "-c", str(config), "-p", str(self.run)], stdout=output, stderr=output
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + 20
        while not listening(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"nginx did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
