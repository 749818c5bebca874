"""Bytes of a file to a socket: by the kernel alone where nothing has to be encrypted, piece by piece."""

from __future__ import annotations

import os
import select
import socket
import ssl
import time

from headrace.cache.bandwidth import PIECE
from headrace.cache.receiving import Blocks


class Upload:
    """Sends one file's bytes over a socket with a timeout, whose descriptor so does not block.

    Args:
        timeout: seconds that a reader may take for a mebibyte. Only time in which this process ran counts: one that
            was stopped (a frozen container) blames nobody for that.
    """

    def __init__(self, sock: socket.socket, fd: int, blocks: Blocks, timeout: float) -> None:
        self._sock = sock
        self._fd = fd
        self._blocks = blocks
        self._timeout = timeout
        self._patience = timeout
        self._due = PIECE

    def send(self, start: int, size: int) -> int:
        """Send from `start` on what finds room, at most `size` bytes; 0 after waiting until there was some.

        Raises:
            OSError: the other side went away; TimeoutError: it reads too slowly.
        """
        if isinstance(self._sock, ssl.SSLSocket):
            return self._encrypted(start, size)
        try:
            sent = os.sendfile(self._sock.fileno(), self._fd, start, size)
        except BlockingIOError:
            self._wait()
            return 0
        if not sent:
            raise OSError("the file became shorter")
        self._due -= sent
        if self._due <= 0:
            self._due, self._patience = PIECE, self._timeout
        return sent

    def gone(self) -> bool:
        """Whether the other side has closed its end."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _wait(self) -> None:
        """For room. The kernel's own timeouts would begin anew with every few bytes."""
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT | select.POLLRDHUP)
        look = self._timeout / 8
        while self._patience > 0:
            begun = time.monotonic()
            ready = poll.poll(look * 1000)
            self._patience -= min(time.monotonic() - begun, look)
            if ready and ready[0][1] & ~select.POLLOUT:
                raise ConnectionResetError
            if ready:
                return
        raise TimeoutError

    def _encrypted(self, start: int, size: int) -> int:
        block = self._blocks.mine()[:size]
        have = os.preadv(self._fd, [block], start)
        if not have:
            raise OSError("the file became shorter")
        self._sock.sendall(block[:have])
        return have
