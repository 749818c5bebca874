"""Free TCP ports on loopback, for servers that cannot say which one they took."""

from __future__ import annotations

import contextlib
import socket


def free(count: int) -> list[int]:
    """`count` different ports that nothing listens on; another process may still be quicker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
