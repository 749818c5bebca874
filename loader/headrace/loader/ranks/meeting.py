"""How the ranks of a process group find those on their own node.

Each rank writes into the group's store which node it is on and where it listens: a Unix socket in the
abstract namespace, which leaves no file behind. Ranks with the same running kernel and the same network
namespace are on one node; the first of them is the hub of their circle. A secret from the store shows that
who connects belongs to the group.

The group itself is not used, so that this works with every backend and mixes with nobody's collectives.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_process_group_store

from headrace.cache.errors import LoadError, UsageError
from headrace.loader.ranks.circle import Circle, refuse

_PREFIX = "headrace/ranks"
_POLL = 0.005
_HELLO = 4096  # bytes: more than any first message has
_LATE = "ended, or hangs, before it began to load"


@dataclass(frozen=True, slots=True)
class Meeting:
    """What came of it.

    Attributes:
        circle: the ranks of this node.
        store: for these ranks and this meeting alone.
    """

    circle: Circle
    store: Store


def meet(group: dist.ProcessGroup, timeout: float, wait: float) -> Meeting:
    """Find and connect the ranks of this node. Every rank of the group must call it, equally often.

    Args:
        group: whose ranks load together.
        timeout: of the circle.
        wait: seconds to wait for the other ranks to come here.

    Raises:
        UsageError: this process is not in the group.
        LoadError: a rank did not come, or the group's store does not answer.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise UsageError(f"group must be a process group that this process is in, not {group!r}")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    store = _get_process_group_store(group)
    name, secret = secrets.token_hex(16), secrets.token_hex(16)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        try:
            listener.bind(f"\0headrace-{name}")
            listener.listen(size)
        except OSError as error:
            raise LoadError(f"ranks cannot connect to each other here: {error.strerror or error}") from error
        try:
            # Counted in the store, so that a rank that was restarted with a new store counts anew.
            number = store.add(f"{_PREFIX}/{rank}/loads", 1)
            keys = [f"{_PREFIX}/{number}/{other}" for other in range(size)]
            mine = {"node": _node(), "socket": name, "secret": secret}
            store.set(keys[rank], json.dumps(mine))
            everybody = _read_all(store, keys, wait)
        except (RuntimeError, ValueError) as error:
            raise LoadError(
                f"the store of the process group does not answer: {_first_line(error)}"
            ) from error
        members = [other for other in range(size) if everybody[other]["node"] == everybody[rank]["node"]]
        hub = members[0]
        if rank == hub:
            channels = _accept(listener, members[1:], secret, timeout)
        else:
            channels = {hub: _connect(everybody[hub], hub, rank, timeout)}
    circle = Circle(rank, members, channels, timeout)
    return Meeting(circle, PrefixStore(f"{_PREFIX}/{number}/{hub}", store))


def _node() -> str:
    """The same for processes that share a kernel, so a page cache, and can connect to each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # hidden: then the name of the host must do
        return socket.gethostname()


def _read_all(store: Store, keys: Sequence[str], wait: float) -> list[dict[str, str]]:
    deadline = time.monotonic() + wait
    pause = _POLL
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            some = "rank " + absent[0] if len(absent) == 1 else "ranks " + ", ".join(absent)
            raise LoadError(
                f"{some} did not begin to load within {wait:g} s: every rank of the group must load together"
            )
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)
    return [json.loads(store.get(key)) for key in keys]


def _accept(
    listener: socket.socket, others: Sequence[int], secret: str, timeout: float
) -> dict[int, socket.socket]:
    channels: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    absent = -1
    try:
        while len(channels) < len(others):
            absent = next(rank for rank in others if rank not in channels)
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                channel, _ = listener.accept()
            except TimeoutError as error:
                raise LoadError(f"rank {absent} {_LATE}") from error
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            rank = _greeted(channel, secret)
            if rank is not None and rank in others and rank not in channels:
                channels[rank] = channel
            else:
                channel.close()
    except BaseException:
        for channel in channels.values():
            refuse(channel, absent, _LATE)
        raise
    return channels


def _greeted(channel: socket.socket, secret: str) -> int | None:
    """The rank that connected, or None for a stranger."""
    with contextlib.suppress(OSError, ValueError):
        said, _, rest = channel.recv(_HELLO).decode().partition(" ")
        if hmac.compare_digest(said, secret):
            channel.sendall(b"\n")
            return int(rest)
    return None


def _connect(place: dict[str, str], hub: int, rank: int, timeout: float) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.settimeout(timeout)
    try:
        channel.connect(f"\0headrace-{place['socket']}")
        channel.sendall(f"{place['secret']} {rank}".encode())
        if channel.recv(1) != b"\n":
            raise ConnectionResetError("it closed the connection")
    except BaseException as error:
        channel.close()
        if isinstance(error, OSError):
            raise LoadError(f"rank {hub} {_LATE} ({error})") from error
        raise
    return channel


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
