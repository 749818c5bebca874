"""Unix sockets that appear whole: with their permissions, in one step, in place of what a killed agent left."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from headrace.cache.errors import AgentError

_LONGEST = 107  # bytes of a path that the kernel takes (unix(7))


def listen(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`.

    Raises:
        AgentError: somebody listens there already, or the path cannot be used.
    """
    target = Path(path)
    # Longer than the name it gets in the end, so that a path that works once works always.
    fresh = target.with_name(f".{uuid.uuid4().hex[:8]}")
    if len(os.fsencode(path)) > _LONGEST or len(os.fsencode(fresh)) > _LONGEST:
        raise AgentError(
            f"the socket {path!r} has a path of more than {_LONGEST} bytes: choose a shorter one."
        )
    if answers(path):
        raise AgentError(f"another agent answers on {path!r}: stop it, or choose another socket.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Nobody can connect before it listens, and it has no name of its own before its mode is right.
        listener.bind(str(fresh))
        os.chmod(fresh, mode)
        listener.listen(128)
        listener.setblocking(False)
        os.rename(fresh, target)
    except OSError as error:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise AgentError(f"the socket {path!r} cannot be made: {error.strerror}.") from None
    return listener


def answers(path: str) -> bool:
    """Whether somebody accepts connections at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            # Full, or not ours to ask: somebody is there all the same.
            return os.path.exists(path)
    return True


def inode(path: str) -> int:
    """By which a socket's file is known again: another agent may put its own there. 0 where there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def unlink(path: str, seen: int) -> None:
    """Remove a socket's file if it is still the one seen."""
    if seen and inode(path) == seen:
        Path(path).unlink(missing_ok=True)


def listen_tcp(address: str, what: str) -> socket.socket:
    """A listening socket at "host:port", for what is not secret.

    Raises:
        AgentError: it cannot listen there; `what` says whose address it is.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        why = error.strerror or error
        raise AgentError(f"{what} {address!r} cannot be listened on: {why}.") from None
    return listener
