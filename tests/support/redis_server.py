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
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from support.namespaces import Namespace
from support.ports import free

from headrace.cache.peers.security import SecurityFiles

BINARY = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin")
_START = 20.0


class RedisServer:
    """One server that keeps nothing on disk; its port stays the same when it is started again.

    Args:
        directory: for its configuration and its log.
        namespace: where it runs.
        host: the address it listens on.
        password: that it asks for.
        binary: another server, such as Valkey's.
        lines: more of its configuration.
        tls: its certificate and key, and the authority that clients' certificates have to be of; it then speaks
            nothing but TLS.
        sentinel: it is a Sentinel.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        namespace: Namespace | None = None,
        host: str = "127.0.0.1",
        password: str | None = None,
        *,
        binary: str | os.PathLike[str] | None = None,
        lines: Sequence[str] = (),
        tls: SecurityFiles | None = None,
        sentinel: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.host = host
        self.port = 0
        self.pid = 0
        self._password = password
        self._binary = binary or BINARY
        self._lines = tuple(lines)
        self._tls = tls
        self._sentinel = sentinel
        self._namespace = namespace
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Without the password."""
        return f"redis{'s' if self._tls else ''}://{self.host}:{self.port}"

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Clients of this server work in here."""
        return contextlib.nullcontext() if self._namespace is None else self._namespace.inside()

    def start(self) -> Self:
        """Start, empty, and wait until it answers.

        Raises:
            RuntimeError: it is not installed, ended, or did not answer in time.
        """
        if self._binary is None:
            raise RuntimeError("redis-server is not installed")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.port:
            with self.inside():
                self.port = free(1)[0]
        lines = [f"bind {self.host}", f"dir {self.directory}"]
        lines += [f"requirepass {self._password}"] if self._password else ["protected-mode no"]
        lines += [] if self._sentinel else ['save ""', "appendonly no"]
        if self._tls is None:
            lines += [f"port {self.port}"]
        else:
            lines += ["port 0", f"tls-port {self.port}", f"tls-ca-cert-file {self._tls.ca}"]
            lines += [f"tls-cert-file {self._tls.certificate}", f"tls-key-file {self._tls.key}"]
        lines += self._lines
        config = self.directory / "redis.conf"
        config.write_text("\n".join(lines) + "\n")
        words = [os.fspath(self._binary), os.fspath(config), *(["--sentinel"] if self._sentinel else [])]
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
        with self.inside(), contextlib.ExitStack() as stack:
            try:
                probe = stack.enter_context(socket.create_connection((self.host, self.port), 1.0))
                if self._tls is not None:
                    # One that asks for a client's certificate says so only after the handshake.
                    context = ssl.create_default_context(cafile=self._tls.ca)
                    context.check_hostname = False
                    probe = stack.enter_context(context.wrap_socket(probe))
                    return True
                probe.sendall(b"PING\r\n")
                return bool(probe.recv(16))  # "+PONG", or that it wants a password
            except OSError:
                return False

    def everything(self) -> bytes:
        """All keys and values, as it would write them to disk."""
        with self.inside(), socket.create_connection((self.host, self.port)) as connection:
            connection.settimeout(_START)
            lines = [f"AUTH {self._password}"] if self._password else []
            connection.sendall("".join(f"{line}\r\n" for line in [*lines, "SAVE", "QUIT"]).encode())
            said = b""
            while data := connection.recv(1 << 16):
                said += data
        assert b"-" not in said, said
        return (self.directory / "dump.rdb").read_bytes()

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
