"""A real Redis for tests, here or in a network namespace: it can be killed, started again empty, and paused.

with RedisServer(tmp_path) as server:
    redis.Redis.from_url(server.url)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from support.namespaces import Namespace
from support.ports import free

BINARY = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin")
_START = 20.0


class RedisServer:
    """One server that keeps nothing on disk; its port stays the same when it is started again.

    Args:
        directory: for its configuration and its log.
        namespace: where it runs.
        host: the address it listens on.
        password: that it asks for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        namespace: Namespace | None = None,
        host: str = "127.0.0.1",
        password: str | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.host = host
        self.port = 0
        self.pid = 0
        self._password = password
        self._namespace = namespace
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Without the password."""
        return f"redis://{self.host}:{self.port}"

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Clients of this server work in here."""
        return contextlib.nullcontext() if self._namespace is None else self._namespace.inside()

    def start(self) -> Self:
        """Start, empty, and wait until it answers.

        Raises:
            RuntimeError: it is not installed, ended, or did not answer in time.
        """
        if BINARY is None:
            raise RuntimeError("redis-server is not installed")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.port:
            with self.inside():
                self.port = free(1)[0]
        lines = [
            f"port {self.port}",
            f"bind {self.host}",
            f"dir {self.directory}",
            'save ""',
            "appendonly no",
        ]
        lines += [f"requirepass {self._password}"] if self._password else ["protected-mode no"]
        config = self.directory / "redis.conf"
        config.write_text("\n".join(lines) + "\n")
        words = [BINARY, os.fspath(config)]
        if self._namespace is not None:
            words = self._namespace.command(*words)
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        self.pid = self._process.pid
        deadline = time.monotonic() + _START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Redis did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        return self

    def _answers(self) -> bool:
        with self.inside(), socket.socket() as probe:
            probe.settimeout(1.0)
            try:
                probe.connect((self.host, self.port))
                probe.sendall(b"PING\r\n")
                return bool(probe.recv(16))  # "+PONG", or that it wants a password
            except OSError:
                return False

    def pause(self) -> None:
        """SIGSTOP: it takes connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: what it knew is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
