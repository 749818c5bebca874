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


class Patience:
    """How long a reader may still keep its piece waiting.

    Only time in which this process ran counts: one that was stopped (a frozen container) blames nobody for that.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._look = seconds / 8

    def wait(self, out: int) -> None:
        """Until a socket has room again. The kernel's own timeouts begin anew with every few bytes.

        Raises:
            TimeoutError: no time is left; ConnectionResetError: the other side went away.
        """
        poll = select.poll()
        poll.register(out, select.POLLOUT | select.POLLRDHUP)
        while self._left > 0:
            begun = time.monotonic()
            ready = poll.poll(self._look * 1000)
            self._left -= min(time.monotonic() - begun, self._look)
            if ready and ready[0][1] & ~select.POLLOUT:
                raise ConnectionResetError
            if ready:
                return
        raise TimeoutError


def send_file(
    sock: socket.socket,
    fd: int,
    start: int,
    stop: int,
    grant: Callable[[int], int],
    blocks: Blocks,
    timeout: float,
) -> bool:
    """Send the bytes [start, stop) of a file; False when `grant` stopped it.

    Args:
        sock: with a timeout, so that its descriptor does not block.
        grant: asked with how many bytes are left, and says how many of them may go now; may wait.
        timeout: seconds that a reader may take for a mebibyte.

    Raises:
        OSError: the other side went away; TimeoutError: it reads too slowly.
    """
    send = _send_tls if isinstance(sock, ssl.SSLSocket) else _send
    due, patience = start, Patience(timeout)
    while start < stop:
        granted = grant(stop - start)
        if not granted:
            return False
        end = start + granted
        while start < end:
            if start >= due:
                due, patience = start + PIECE, Patience(timeout)
            start += send(sock, fd, start, end - start, blocks, patience)
    return True


def gone(sock: socket.socket) -> bool:
    """Whether the other side has closed its end."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _send(sock: socket.socket, fd: int, start: int, size: int, blocks: Blocks, patience: Patience) -> int:
    out = sock.fileno()
    while True:
        try:
            sent = os.sendfile(out, fd, start, size)
        except BlockingIOError:
            patience.wait(out)
            continue
        if not sent:
            raise OSError("the file became shorter")
        return sent


def _send_tls(sock: socket.socket, fd: int, start: int, size: int, blocks: Blocks, patience: Patience) -> int:
    block = blocks.mine()[:size]
    have = os.preadv(fd, [block], start)
    if not have:
        raise OSError("the file became shorter")
    sock.sendall(block[:have])
    return have
