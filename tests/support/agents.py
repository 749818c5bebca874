"""Real agents for tests: `headrace agent` as a process, its socket, its log, its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from support.command import Command, wait_until

from headrace.prefetch.client import AgentClient


@dataclass
class RunningAgent:
    """One agent of `command`'s user and store, under `folder`.

    Attributes:
        more: what its configuration file says besides, by section.
        environ: what its environment has besides.
    """

    command: Command
    folder: Path
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = None

    @property
    def socket(self) -> str:
        return str(self.folder / "agent.sock")

    @property
    def client(self) -> AgentClient:
        return AgentClient(self.socket)

    @property
    def config(self) -> Path:
        return self.folder / "agent.toml"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def configure(self, more: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Write its configuration file."""
        if more is not None:
            self.more = more
        sections: dict[str, dict[str, Any]] = {
            "agent": {"socket": self.socket, "volumes": str(self.folder / "volumes"), "metrics": ""}
        }
        for name, values in self.more.items():
            sections.setdefault(name, {}).update(values)
        lines = [f"root = {json.dumps(str(self.command.root))}"]
        for name, values in sections.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def start(self, *, wait: bool = True) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.configure()
        self._log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli.main", "agent", "--config", str(self.config)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**self.command.environment(), **self.environ},
            start_new_session=True,
        )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        assert self.process is not None
        process = self.process
        wait_until(lambda: process.poll() is not None or self.client.there)
        assert process.poll() is None, self.log()

    @contextlib.contextmanager
    def raw(self, method: str, path: str, body: bytes, socket: str | None = None) -> Iterator[HTTPResponse]:
        """A request as it may come from anywhere."""
        with AgentClient(socket or self.socket).connected() as connection:
            connection.request(method, path, body)
            yield connection.getresponse()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def children(self) -> list[int]:
        """Ids of the processes that it has started and that run."""
        found = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError):
                found += [int(pid) for pid in path.read_text().split()]
        return found

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        assert self.process is not None
        code = self.process.wait(60)
        if self._log is not None:
            self._log.close()
            self._log = None
        return code

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        """`kill -9`, and wait until its staging processes have noticed."""
        left = self.children()
        self.signal(signal.SIGKILL)
        self.ended()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))

    def commands(self) -> Command:
        """The command line of a user who finds this agent."""
        environ = {**self.command.environ, "HEADRACE_SOCKET": self.socket}
        return Command(self.command.home, self.command.root, environ)

    def __enter__(self) -> Self:
        if self.process is None or self.process.poll() is not None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.ended()


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
