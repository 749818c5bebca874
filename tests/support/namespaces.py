"""Network namespaces joined by a bridge, with shaped links: several nodes on one machine.

with Network() as network:
    node = network.add("node0", rate=Rate(up=400, down=400))     # Mbit/s
    process = subprocess.Popen(node.command("headrace", "agent", ...))
    network.cut([node], [other])                                  # a partition
    network.heal()

Crash story: names of namespaces carry the owner's process id and when it started. Whoever makes a network first
removes those whose owner is gone, with the processes in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "headrace-"
_TOOLS = ("ip", "tc", "nft", "nsenter")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_BURST = "256kb"
_LATENCY = "50ms"
_PATIENCE = 10.0
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Rate:
    """Mbit/s that a node may send and receive; they hold for all its traffic together."""

    up: float
    down: float

    def scaled(self, factor: float) -> Rate:
        return Rate(self.up * factor, self.down * factor)


def missing() -> str | None:
    """Why there can be no network here; None if there can."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    absent = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"needs the programs {', '.join(absent)}" if absent else None


class Namespace:
    """A network of its own; `name` is the kernel's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = _FOLDER / name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def command(self, *words: str | os.PathLike[str]) -> list[str]:
        """The command line that runs `words` in here; the process is the command itself, not a parent of it."""
        return ["nsenter", f"--net={self.path}", "--", *(os.fspath(word) for word in words)]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and threads that it starts meanwhile, have this network until the block ends."""
        with open("/proc/thread-self/ns/net") as outside, open(self.path) as inside:
            _enter(inside.fileno())
            try:
                yield
            finally:
                _enter(outside.fileno())

    def processes(self) -> list[int]:
        """The ids of the processes in here."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.name).split()]


class Node(Namespace):
    """One node's network: its loopback, and one address on the bridge."""

    def __init__(self, name: str, address: str, port: str) -> None:
        super().__init__(name)
        self.address = address
        self.port = port


class Network:
    """A bridge in a namespace of its own, and the nodes on it."""

    def __init__(self) -> None:
        sweep()
        self._stem = f"{PREFIX}{os.getpid()}-{_started(os.getpid())}-{next(_serial)}-"
        self._bridge = Namespace(self._stem + "bridge")
        self.nodes: dict[str, Node] = {}
        self._lock = threading.Lock()

    def start(self) -> Self:
        _run("ip", "netns", "add", self._bridge.name)
        batch = "link set lo up\nlink add bridge type bridge\nlink set bridge up\n"
        _run("ip", "-n", self._bridge.name, "-batch", "-", given=batch)
        # What passes the bridge need not be looked at as IP as well.
        with contextlib.suppress(FileNotFoundError), self._bridge.inside():
            Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("0")
        return self

    def add(self, name: str, rate: Rate | None = None) -> Node:
        """A node of that name, with the next free address."""
        with self._lock:
            number = len(self.nodes) + 1
            node = Node(self._stem + name, f"10.111.0.{number}", f"port{number}")
            assert name not in self.nodes
            self.nodes[name] = node
        _run("ip", "netns", "add", node.name)
        link = f"link add {node.port} type veth peer name eth0 netns {node.name}\n"
        link += f"link set {node.port} master bridge\nlink set {node.port} up\n"
        _run("ip", "-n", self._bridge.name, "-batch", "-", given=link)
        inner = f"link set lo up\naddr add {node.address}/24 dev eth0\nlink set eth0 up\n"
        _run("ip", "-n", node.name, "-batch", "-", given=inner)
        with node.inside():
            # Nodes have cubic mostly, which a namespace may not choose; this behaves like it on so short a way.
            Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
        if rate is not None:
            self.shape(node, rate)
        return node

    def shape(self, node: Node, rate: Rate) -> None:
        """Give a node's link another speed, from now on."""
        _limit(node.name, "eth0", rate.up)
        _limit(self._bridge.name, node.port, rate.down)

    def cut(self, one: Iterable[Node], other: Iterable[Node]) -> None:
        """From now on nothing passes between the nodes of two groups; connections are not told."""
        here, there = ("{ " + ", ".join(f'"{n.port}"' for n in group) + " }" for group in (one, other))
        rules = "table bridge cut {\n chain forward {\n  type filter hook forward priority 0;\n"
        # Only IP: who looked for an address in vain waits a second before asking again.
        for source, target in ((here, there), (there, here)):
            rules += f"  iifname {source} oifname {target} ether type ip drop\n"
        rules += " }\n}\n"
        _run(*self._bridge.command("nft", "-f", "-"), given=rules)

    def heal(self) -> None:
        """Undo every `cut`."""
        _run(*self._bridge.command("nft", "flush", "ruleset"))

    def stop(self) -> None:
        """Remove it all, with the processes that are still in it."""
        _remove([*(node.name for node in self.nodes.values()), self._bridge.name])
        self.nodes.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def sweep() -> list[str]:
    """Remove the namespaces of test runs that are gone; returns their names."""
    stale = []
    for path in sorted(_FOLDER.glob(f"{PREFIX}*")):
        pid, started = path.name.removeprefix(PREFIX).split("-")[:2]
        if _started(int(pid)) != started:
            stale.append(path.name)
    _remove(stale)
    return stale


def _remove(names: Sequence[str]) -> None:
    there = [name for name in names if (_FOLDER / name).exists()]
    deadline = time.monotonic() + _PATIENCE
    for name in there:
        # A namespace lives as long as a process in it.
        namespace = Namespace(name)
        while left := namespace.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes in the namespace {name} outlive SIGKILL: {left}")
            time.sleep(0.01)
        _run("ip", "netns", "del", name)


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _limit(namespace: str, device: str, rate: float) -> None:
    shaping = ["tbf", "rate", f"{round(rate * 1e6)}bit", "burst", _BURST, "latency", _LATENCY]
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shaping)


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a network namespace: {os.strerror(number)}")


def _run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": _PATH},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
