"""A peer that misbehaves: a real agent, registered with the real tracker and the real secret, whose answers pass
through this program on their way to other nodes. It does to chunks what its mode says, and lets all else pass.

    python -m support.faulty_relay corrupt 10.111.0.3:7700 127.0.0.1:7701
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from support.namespaces import Node

from headrace.cache.peers.protocol import VERSION, VERSION_HEADER

_HEAD_END = b"\r\n\r\n"


class _Stream:
    """Reads heads and bodies of HTTP messages from a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def head(self) -> bytes:
        while _HEAD_END not in self._rest:
            self._rest += self._more()
        head, _, self._rest = self._rest.partition(_HEAD_END)
        return head + _HEAD_END

    def body(self, length: int) -> bytes:
        while len(self._rest) < length:
            self._rest += self._more()
        body, self._rest = self._rest[:length], self._rest[length:]
        return body

    def _more(self) -> bytes:
        data = self.sock.recv(1 << 20)
        if not data:
            raise EOFError
        return data


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


# Each gets the client's socket, and head and body of a good answer that carries chunks.


def _corrupt(client: socket.socket, head: bytes, body: bytes) -> None:
    middle = len(body) // 2
    client.sendall(head + body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])


def _stall(client: socket.socket, head: bytes, body: bytes) -> None:
    client.sendall(head + body[: len(body) // 2])
    time.sleep(3600)


def _cut(client: socket.socket, head: bytes, body: bytes) -> None:
    client.sendall(head + body[: len(body) // 2])
    raise EOFError


def _lie(client: socket.socket, head: bytes, body: bytes) -> None:
    """It was said to hold this."""
    said = b"there is no such object here."
    answer = f"HTTP/1.1 404 Not Found\r\n{VERSION_HEADER}: {VERSION}\r\nContent-Length: {len(said)}\r\n\r\n"
    client.sendall(answer.encode() + said)


def _short(client: socket.socket, head: bytes, body: bytes) -> None:
    """Well-formed, but less than was asked for."""
    client.sendall(head.replace(b" %d\r\n" % len(body), b" %d\r\n" % (len(body) - 1)) + body[:-1])


def _garbage(client: socket.socket, head: bytes, body: bytes) -> None:
    client.sendall(b"\x16\x03\x01" + body[:5000])
    raise EOFError


MODES: dict[str, Callable[[socket.socket, bytes, bytes], None]] = {
    "corrupt": _corrupt,
    "stall": _stall,
    "cut": _cut,
    "lie": _lie,
    "short": _short,
    "garbage": _garbage,
}


def _relay(client: socket.socket, behind: tuple[str, int], mode: str) -> None:
    with contextlib.suppress(EOFError, OSError), client, socket.create_connection(behind) as server:
        asked, answers = _Stream(client), _Stream(server)
        while True:
            request = asked.head()
            server.sendall(request)
            head = answers.head()
            body = answers.body(_length(head))
            if b"/chunks/" in request.split(b"\r\n")[0] and head.split()[1] == b"200":
                MODES[mode](client, head, body)
            else:
                client.sendall(head + body)


def start(node: Node, mode: str, listen: str, behind: str) -> subprocess.Popen[bytes]:
    """Run it on a node; returns when it listens."""
    words = [sys.executable, "-m", "support.faulty_relay", mode, listen, behind]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(node.command(*words), stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline(), "the relay did not start"
    return process


def main(mode: str, listen: str, behind: str) -> None:
    (host, port), (inner, inner_port) = (address.rsplit(":", 1) for address in (listen, behind))
    with socket.create_server((host, int(port)), backlog=128) as server:
        print("listening", flush=True)
        while True:
            client, _ = server.accept()
            threading.Thread(
                target=_relay, args=(client, (inner, int(inner_port)), mode), daemon=True
            ).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
