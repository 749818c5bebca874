"""A cluster for tests: agents in network namespaces, each with a store of its own, a real Redis, a real origin.

Nodes die by SIGKILL, stand still by SIGSTOP, and lose each other by rules on the bridge between them.
"""

from __future__ import annotations

import contextlib
import filecmp
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.command import wait_until
from support.namespaces import Network, Node, Rate
from support.origin import Origin
from support.redis_server import RedisServer

from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.errors import HeadraceError
from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.staging import StageReport
from headrace.cache.store import Store
from headrace.prefetch import messages

PEER_PORT, METRICS_PORT = 7700, 9464
PATIENCE = 60.0

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""For stores: nodes have a disk each, and this machine one, which all would wait for."""

Settings = Mapping[str, Mapping[str, Any]]
"""Sections of the agent's configuration file."""


@dataclass(frozen=True, slots=True)
class Staged:
    """How staging ended on one node: with a report, with headrace's own error, or because the agent died.

    Attributes:
        at: seconds of the monotonic clock at its end.
    """

    member: Member
    report: StageReport | None
    error: HeadraceError | None
    at: float

    @property
    def files(self) -> Path:
        assert self.report is not None, f"{self.member} did not stage: {self.error}"
        return Path(self.report.path)

    def check(self, source: Path) -> None:
        """Every byte is the source's."""
        files = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and p.name != PUBLISHED_NAME}
        assert {p.relative_to(self.files) for p in self.files.rglob("*") if p.is_file()} == files
        for path in files:
            assert filecmp.cmp(source / path, self.files / path, shallow=False), (
                f"{self.member}: {path} differs"
            )


class Member:
    """One node of a cluster: its agent, its store, its network.

    Attributes:
        settings, environ: of its agent, from its next start on.
    """

    def __init__(
        self, name: str, node: Node, folder: Path, settings: Settings, environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self.node = node
        self.folder = folder
        self.root = folder / "store"
        self.settings = {section: dict(values) for section, values in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None
        self.environ = dict(environ)
        folder.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"Member({self.name})"

    @property
    def socket(self) -> Path:
        return self.folder / "socket"

    @property
    def address(self) -> str:
        """Of its peer server."""
        return f"{self.node.address}:{PEER_PORT}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    # -- the process

    def start(self, *, wait: bool = True) -> None:
        """Start the agent.

        Raises:
            AssertionError: it ended, or was not ready in time.
        """
        config = self.folder / "config.toml"
        config.write_text(_toml(self.settings))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.node.command(sys.executable, "-m", "headrace.cli.main", "agent", "--config", config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.ready or self._ended) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.ready, f"{self} did not get ready: {self.log[-2000:]}"

    @property
    def _ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    @property
    def ready(self) -> bool:
        try:
            return bool(self.ask("GET", "/readyz", raw=True) == b"ok\n")
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL the agent; its processes that stage find out for themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def crash(self) -> None:
        """SIGKILL everything on the node at once."""
        for pid in self.node.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        wait_until(lambda: not self.node.processes())

    def kill_worker(self) -> bool:
        """SIGKILL one of the processes that stage; whether there was one."""
        assert self.process is not None
        for pid in self.node.processes():
            if pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    def pause(self) -> None:
        """SIGSTOP everything on the node."""
        for pid in self.node.processes():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.node.processes():
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE)

    # -- what it is asked

    def ask(self, method: str, path: str, body: object = None, *, raw: bool = False) -> Any:
        """One request on the administrator's socket. Raises HeadraceError, OSError."""
        with contextlib.closing(_Unix(self.socket)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            said = answer.read()
            if raw:
                return said
            values = json.loads(said)
            if "error" in values:
                raise messages.error_from_json(values["error"])
            return values

    def stage(self, reference: str, *, of: str = "demand", **request: Any) -> Staged:
        """Stage, and wait for its end."""
        body = {"request": {"reference": reference, **request}, "class": of}
        report, error = None, None
        try:
            with contextlib.closing(_Unix(self.socket)) as connection:
                connection.request("POST", "/v1/stage", json.dumps(body))
                for line in connection.getresponse():
                    values = json.loads(line)
                    if "report" in values:
                        report = messages.report_from_json(values["report"])
                    if "error" in values:
                        error = messages.error_from_json(values["error"])
        except (OSError, http.client.HTTPException):
            pass  # the agent died: neither report nor error
        return Staged(self, report, error, time.monotonic())

    def metrics(self) -> dict[str, float]:
        """Of its Prometheus page, by name with labels."""
        with (
            self.node.inside(),
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", METRICS_PORT)) as page,
        ):
            page.request("GET", "/metrics")
            lines = page.getresponse().read().decode().splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    def chunks(self) -> int:
        """How many verified chunks its store has."""
        found = 0
        with contextlib.suppress(HeadraceError), Store.open(self.root, writable=False) as store:
            for domain in store.domains():
                for folder in domain.objects():
                    with (
                        contextlib.suppress(HeadraceError, FileNotFoundError),
                        ChunkMap.open(folder.map, writable=False) as chunk_map,
                    ):
                        states = chunk_map.states()
                        found += len(states) - states.count(ABSENT)
        return found


class Cluster:
    """Members on one network that share a Redis and an origin.

    Args:
        network: its addresses.
        origin: what they read.
        folder: for stores, configurations and logs; a short path, for its sockets.
        rate: of each node's link.
        tracker: share a Redis; else members know of each other by `static` alone, if at all.
        password: of that Redis.
        settings: more for each agent, by section.
    """

    def __init__(
        self,
        network: Network,
        origin: Origin,
        folder: Path,
        *,
        rate: Rate | None = None,
        tracker: bool = True,
        password: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.network = network
        self.origin = origin
        self.folder = folder
        self.members: list[Member] = []
        self.redis: RedisServer | None = None
        self._rate = rate
        self._settings = settings or {}
        self._tracker = tracker
        self._password = password
        self._pool = ThreadPoolExecutor(64, "cluster")
        self.secret = folder / "secret"

    def start(self, count: int) -> Self:
        """Redis and the first members."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.secret.write_text(secrets.token_hex(32) + "\n")
        self.secret.chmod(0o600)
        if self._tracker:
            node = self.network.nodes.get("redis") or self.network.add("redis")
            self.redis = RedisServer(self.folder / "redis", node, node.address, self._password)
            self.redis.start()
        self.add(count)
        return self

    def add(self, count: int = 1, settings: Settings | None = None) -> list[Member]:
        """More members, ready to stage."""
        fresh = [self.member(settings) for _ in range(count)]
        for member in fresh:
            member.start(wait=False)
        for member in fresh:
            member.wait_ready()
        return fresh

    def member(self, settings: Settings | None = None) -> Member:
        """One more, not started."""
        name = f"node{len(self.members)}"
        node = self.network.nodes.get(name) or self.network.add(name, self._rate)
        folder = self.folder / name
        sections: dict[str, dict[str, Any]] = {
            "": {"root": str(folder / "store")},
            "agent": {
                "socket": str(folder / "socket"),
                "volumes": str(folder / "volumes"),
                "metrics": f"127.0.0.1:{METRICS_PORT}",
            },
            "node": {"name": name},
            "peers": {"listen": f"{node.address}:{PEER_PORT}", "secrets": {"default": str(self.secret)}},
        }
        if self.redis is not None:
            sections["tracker"] = {"url": self.redis.url}
            if self._password is not None:
                file = self.folder / "password"
                file.write_text(self._password)
                sections["tracker"]["password_file"] = str(file)
        for more in (self._settings, settings or {}):
            for section, values in more.items():
                sections[section] = {**sections.get(section, {}), **values}
        kept = {
            k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HEADRACE_")
        }
        path = os.pathsep.join(p for p in sys.path if p)
        environ = {**kept, **self.origin.environ, "HOME": str(folder), "PYTHONPATH": path}
        made = Member(name, node, folder, sections, environ)
        self.members.append(made)
        return made

    def begin(
        self, reference: str, members: Iterable[Member] | None = None, **how: Any
    ) -> list[Future[Staged]]:
        """Stage on all members, or some, at the same moment."""
        chosen = self.members if members is None else members
        return [self._pool.submit(member.stage, reference, **how) for member in chosen]

    def stage(self, reference: str, members: Iterable[Member] | None = None, **how: Any) -> list[Staged]:
        """The same, and wait for their ends."""
        return ends(self.begin(reference, members, **how))

    def close(self) -> None:
        for member in self.members:
            if member.process is not None:
                with contextlib.suppress(OSError):
                    member.resume()
                member.crash()
        if self.redis is not None:
            self.redis.stop()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ends(futures: Sequence[Future[Staged]], patience: float = 240.0) -> list[Staged]:
    """What became of all; nothing may hang."""
    _, hanging = wait_for(futures, patience)
    assert not hanging, f"{len(hanging)} of {len(futures)} nodes are still staging after {patience:.0f} s"
    return [future.result() for future in futures]


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(self._path))


def _toml(settings: Settings) -> str:
    """JSON's texts, numbers and lists are TOML's, too."""
    lines = []
    for section, values in settings.items():
        if section:
            lines.append(f"[{section}]")
        for key, value in values.items():
            if isinstance(value, Mapping):
                inner = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())
                lines.append(f"{key} = {{ {inner} }}")
            else:
                lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"
