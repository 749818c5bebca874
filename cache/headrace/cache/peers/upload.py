"""Bytes of a file to a socket: by the kernel alone where nothing has to be encrypted, piece by piece."""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections.abc import Callable

from headrace.cache.bandwidth import PIECE
from headrace.cache.receiving import Blocks


def send_file(
    sock: socket.socket,
    fd: int,
    start: int,
    stop: int,
    may_go: Callable[[int], bool],
    blocks: Blocks,
    timeout: float,
) -> bool:
    """Send the bytes [start, stop) of a file; False when `may_go` stopped it.

    Args:
        sock: with a timeout, so that its descriptor does not block.
        may_go: asked before each piece with its size; may wait.
        timeout: seconds that a reader may take for a piece.

    Raises:
        OSError: the other side went away; TimeoutError: it reads too slowly.
    """
    send = _send_tls if isinstance(sock, ssl.SSLSocket) else _send
    while start < stop:
        size = min(PIECE, stop - start)
        if not may_go(size):
            return False
        send(sock, fd, start, size, blocks, time.monotonic() + timeout)
        start += size
    return True


def gone(sock: socket.socket) -> bool:
    """Whether the other side has closed its end."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _send(sock: socket.socket, fd: int, start: int, size: int, blocks: Blocks, deadline: float) -> None:
    out = sock.fileno()
    while size:
        try:
            sent = os.sendfile(out, fd, start, size)
        except BlockingIOError:
            _wait(out, deadline)
            continue
        if not sent:
            raise OSError("the file became shorter")
        start += sent
        size -= sent


def _wait(out: int, deadline: float) -> None:
    """Until there is room again. A wait in the kernel's own `sendfile` would begin anew with every few bytes."""
    poll = select.poll()
    poll.register(out, select.POLLOUT | select.POLLRDHUP)
    left = deadline - time.monotonic()
    ready = poll.poll(left * 1000) if left > 0 else []
    if not ready:
        raise TimeoutError
    if ready[0][1] & ~select.POLLOUT:
        raise ConnectionResetError


def _send_tls(sock: socket.socket, fd: int, start: int, size: int, blocks: Blocks, deadline: float) -> None:
    block = blocks.mine()[:size]
    have = 0
    while have < size:
        read = os.preadv(fd, [block[have:]], start + have)
        if not read:
            raise OSError("the file became shorter")
        have += read
    sock.sendall(block)
