"""Bytes from a socket into memory that is used again and again, and from there to whoever takes them.

A block of a mebibyte stays in the processor's cache while it is hashed and written, where a client library makes
each body a fresh buffer.
"""

from __future__ import annotations

import asyncio
import http.client
import mmap
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

BLOCK = 1 << 20
"""Bytes handed on at once: about a core's second-level cache (256 KiB cost half as much again, 4 MiB a tenth)."""

Put = Callable[[memoryview], None]
"""Takes the next bytes; they change once it has returned."""


class Blocks:
    """A block of memory for each thread that asks."""

    def __init__(self) -> None:
        self._memory = threading.local()

    def mine(self) -> memoryview:
        """This thread's block, in one huge page."""
        block: memoryview | None = getattr(self._memory, "block", None)
        if block is None:
            pages = mmap.mmap(-1, 2 * BLOCK)
            pages.madvise(mmap.MADV_HUGEPAGE)
            block = self._memory.block = memoryview(pages)[:BLOCK]
        return block


async def connect(host: str, port: int, timeout: float, stall: float) -> socket.socket:
    """A connection to the first of a name's addresses that takes one; it blocks.

    Args:
        timeout: seconds until it stands.
        stall: seconds that `receive` waits for more bytes.

    Raises:
        OSError: none does; TimeoutError: not in time.
    """
    async with asyncio.timeout(timeout):
        addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        connected = await _first(addresses)
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # While the body comes the kernel itself waits, for a block at a time.
    seconds, rest = divmod(stall, 1)
    connected.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6))
    )
    return connected


async def _first(addresses: Sequence[tuple[Any, ...]]) -> socket.socket:
    failed: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed or OSError("the name has no address")


def receive(sock: socket.socket, block: memoryview, first: bytes, start: int, stop: int, put: Put) -> None:
    """Bring the bytes [start, stop) to `put`, in blocks that end at multiples of `BLOCK`.

    Args:
        sock: blocks, with a timeout of its own (see `connect`); TLS: with `settimeout`.
        block: at least `BLOCK` bytes.
        first: what was read of them already; less than `BLOCK`.

    Raises:
        TimeoutError: nothing came for too long.
        http.client.IncompleteRead: the connection was closed before the end.
    """
    fill = _fill_tls if isinstance(sock, ssl.SSLSocket) else _fill
    position, have = start, len(first)
    block[:have] = first
    while position < stop:
        want = min(stop - position, BLOCK - position % BLOCK)
        while have < want:
            have += fill(sock, block[have:want])
        put(block[:want])
        have -= want
        if have:
            block[:have] = bytes(block[want : want + have])
        position += want


def _fill(sock: socket.socket, memory: memoryview) -> int:
    """As many bytes as come before the connection is silent for too long, or all."""
    try:
        count = sock.recv_into(memory, 0, socket.MSG_WAITALL)
    except BlockingIOError as error:  # how SO_RCVTIMEO shows
        raise TimeoutError from error
    if not count:
        raise http.client.IncompleteRead(b"")
    return count


def _fill_tls(sock: socket.socket, memory: memoryview) -> int:
    count = sock.recv_into(memory)
    if not count:
        raise http.client.IncompleteRead(b"")
    return count
