"""The head of an HTTP/1.1 message: read from a socket within bounds, and written.

Both sides are ours, so it is the plain subset that they speak: no folded lines, no transfer codings; bodies only in
answers, with their length.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.cache.errors import PeerError
from headrace.cache.peers.protocol import MAX_HEAD

_END = b"\r\n\r\n"


class Closed(Exception):
    """The other side closed the connection between two messages."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line's three words, and the headers by lower-case name."""

    first: tuple[str, str, str]
    headers: Mapping[str, str]

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        asked = self.headers.get("connection", "").lower()
        version = self.first[0] if self.first[0].startswith("HTTP/") else self.first[2]
        return asked == "close" or (version == "HTTP/1.0" and asked != "keep-alive")

    def length(self) -> int:
        """Of the body.

        Raises:
            PeerError: not said, or not a number.
        """
        text = self.headers.get("content-length", "")
        if not (text.isascii() and text.isdecimal()) or len(text) > 15 or "transfer-encoding" in self.headers:
            raise PeerError("the other node sent an answer without a length.")
        return int(text)


def read_head(sock: socket.socket, rest: bytes, timeout: float) -> tuple[Head, bytes]:
    """The next head, and what came with it of what follows.

    Args:
        sock: its own timeout bounds each wait.
        rest: what was read too much before.
        timeout: seconds from the first byte to the last.

    Raises:
        Closed: nothing came before the end.
        PeerError: larger than `MAX_HEAD`, too slow, or not HTTP.
        OSError: the connection failed, or its own timeout passed.
    """
    data, begun = rest, 0.0
    while (end := data.find(_END)) < 0:
        if data and not data[:1].isalpha():
            raise PeerError("what came is not HTTP/1.1.")  # TLS, say: its headers would never end
        if len(data) > MAX_HEAD:
            raise PeerError(f"the other node sent more than {MAX_HEAD} bytes of headers.")
        more = sock.recv(MAX_HEAD)
        if not more:
            if data:
                raise PeerError("the connection ended in the middle of the headers.")
            raise Closed
        now = time.monotonic()
        begun = begun or now
        if now - begun > timeout:
            raise PeerError("the headers came too slowly.")
        data += more
    if end > MAX_HEAD:
        raise PeerError(f"the other node sent more than {MAX_HEAD} bytes of headers.")
    return _parse(data[:end]), data[end + len(_END) :]


def write_head(first: str, headers: Mapping[str, str]) -> bytes:
    """A head as it goes over the wire; values are ours, without line ends."""
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace")


def _parse(data: bytes) -> Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) != 3 or not ("HTTP/1." in words[0] or words[2].startswith("HTTP/1.")):
        raise PeerError("what came is not HTTP/1.1.")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise PeerError("a header is malformed.")
        headers[name.lower()] = value.strip()
    return Head((words[0], words[1], words[2]), headers)
