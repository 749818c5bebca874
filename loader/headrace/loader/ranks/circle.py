"""The ranks of one node, connected: they tell each other values, that they live, and when one fails.

A star of Unix sockets around the first rank, the hub. The kernel closes the socket of a process that ends,
however it ends, so a rank that was killed is missed at once. One that is stopped, or hangs in a read, is
missed when nothing was heard from it, or it made no progress, for `timeout` seconds in which the judge ran
itself. The hub judges the
others, the others judge the hub; whoever fails or is missed, every rank learns of it and by whom.

What goes over a socket: frames of a length (4 bytes, little-endian) and so many bytes of JSON::

    {"value": v, "last": bool}     to the hub: this rank's part of what is being gathered
    {"values": [...], "last": bool}     from the hub: everybody's
    {"alive": n}                   several times in `timeout`; n changes when work is done, null: do not judge
    {"failed": rank, "why": text}  the end
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.cache.errors import LoadError

_LENGTH = struct.Struct("<I")
_PATIENCE = 5.0  # seconds in which the end of a process is known
_MOST = 64 * 1024 * 1024  # bytes of one frame

GONE = "ended, or gave up, before every rank had loaded: look at what it said"
_UNINTELLIGIBLE = "sent something unintelligible: give all ranks the same version of headrace"


@dataclass(slots=True)
class _Peer:
    """Another rank, at the other end of a socket."""

    rank: int
    channel: socket.socket
    received: bytearray = field(default_factory=bytearray)
    heard: float = 0.0
    progress: int | None = None
    moved: float = 0.0


def refuse(channel: socket.socket, rank: int, why: str) -> None:
    """Tell who is at the other end that `rank` failed before there was a circle, and close."""
    with contextlib.suppress(OSError):
        channel.sendall(_framed({"failed": rank, "why": why}))
    channel.close()


def _framed(frame: dict[str, Any]) -> bytes:
    data = json.dumps(frame).encode()
    return _LENGTH.pack(len(data)) + data


class Circle:
    """This rank's place among those of its node.

    Args:
        rank: this one's number.
        members: the numbers of all ranks of the node, this one's too; the least is the hub.
        channels: connected sockets, by rank: the hub's to all others, everybody else's to the hub.
        timeout: seconds after which a rank that is silent, or makes no progress, counts as failed.

    Attributes:
        progress: gives a number that changes as work is done, or None while this rank waits for something
            else than itself. Called in another thread.
        on_failure: called once, in another thread, when another rank failed.
        failure: what to raise, once a rank has failed; it names the rank.
    """

    def __init__(
        self, rank: int, members: Sequence[int], channels: Mapping[int, socket.socket], timeout: float
    ) -> None:
        self.rank = rank
        self.members = tuple(sorted(members))
        self.timeout = timeout
        self.progress: Callable[[], int | None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self._clock = 0.0  # of the watching thread: see `_watch`
        self._peers = {number: _Peer(number, channel) for number, channel in channels.items()}
        self._change = threading.Condition()
        self._sending = threading.Lock()
        self._parts: dict[int, Any] = {}  # the hub's: what came so far
        self._gathered: list[Any] | None = None
        self._waiting = False
        self._over = False  # everything was gathered: who leaves now does so rightly
        self._closing = False
        self.failure: LoadError | None = None
        self._thread: threading.Thread | None = None
        if self._peers:
            for peer in self._peers.values():
                peer.channel.settimeout(max(0.1, timeout / 4))
            self._wake, self._woken = socket.socketpair()
            self._thread = threading.Thread(target=self._watch, name="headrace-ranks", daemon=True)
            self._thread.start()

    @property
    def hub(self) -> int:
        return self.members[0]

    def gather(self, value: Any, *, last: bool = False) -> list[Any]:
        """Everybody's value, in the order of `members`, once everybody has called this.

        Args:
            value: what JSON can express.
            last: nothing is gathered afterwards, and ranks may leave.

        Raises:
            LoadError: a rank failed, ended or hangs; it is named.
        """
        self.check()
        if not self._peers:
            self._over = self._over or last
            return [value]
        self._waiting = True
        if self.rank == self.hub:
            self._part(self.rank, value, last)
        else:
            self._send(self._peers[self.hub], {"value": value, "last": last})
        with self._change:
            self._change.wait_for(lambda: self.failure is not None or self._gathered is not None)
            self._waiting = False
            if self._gathered is None:
                assert self.failure is not None
                raise self.failure
            values, self._gathered = self._gathered, None
        return values

    def check(self) -> None:
        """Raises: LoadError: a rank failed, ended or hangs."""
        if self.failure is not None:
            raise self.failure

    def blame(self) -> None:
        """Something between the ranks broke: wait a moment until it is known whose end that was.

        Raises:
            LoadError: a rank failed, ended or hangs.
        """
        with self._change:
            self._change.wait_for(lambda: self.failure is not None, min(_PATIENCE, self.timeout))
        self.check()

    def leave(self, why: str = "") -> None:
        """Say why this rank cannot go on, if it cannot, and close. The others fail, unless all was gathered."""
        if not self._peers:
            return
        with self._change:
            silent = self._over or self._closing or self.failure is not None
        if why and not silent:
            self._tell({"failed": self.rank, "why": f"failed: {why}"})
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            for end in (self._wake, self._woken, *(peer.channel for peer in self._peers.values())):
                end.close()

    # -- sending ----------------------------------------------------------------------------------------

    def _send(self, peer: _Peer, frame: dict[str, Any]) -> None:
        # Who cannot be reached is found missing by the watching thread, with all that it still had to say.
        with self._sending, contextlib.suppress(OSError):
            peer.channel.sendall(_framed(frame))

    def _tell(self, frame: dict[str, Any], but: int | None = None) -> None:
        for peer in self._peers.values():
            if peer.rank != but:
                self._send(peer, frame)

    def _part(self, rank: int, value: Any, last: bool) -> None:
        """The hub has got a rank's part."""
        with self._change:
            self._parts[rank] = value
            if len(self._parts) < len(self.members):
                return
            values = [self._parts[member] for member in self.members]
            self._parts = {}
            self._over = self._over or last  # before anybody can know, and leave
        self._tell({"values": values, "last": last})
        self._complete(values, last)

    def _complete(self, values: list[Any], last: bool) -> None:
        with self._change:
            self._over = self._over or last
            self._gathered = values
            self._change.notify_all()

    # -- the watching thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        beat = min(1.0, self.timeout / 5)
        next_beat = 0.0
        before = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer in self._peers.values():
                selector.register(peer.channel, selectors.EVENT_READ, peer)
            while not self._closing:
                ready = selector.select(max(0.0, next_beat - time.monotonic()))
                # Where a machine was paused, so were the others: nobody can be blamed for that time alone.
                now = time.monotonic()
                self._clock += min(now - before, self.timeout / 2)
                before = now
                for key, _ in ready:
                    if key.data is not None and not self._receive(key.data):
                        selector.unregister(key.fileobj)
                if now >= next_beat and not self._closing and self.failure is None and not self._over:
                    self._tell({"alive": None if self._waiting else self.progress()})
                    self._judge()
                if now >= next_beat:
                    next_beat = now + beat

    def _receive(self, peer: _Peer) -> bool:
        """Take what a peer sent; False when nothing will come any more."""
        try:
            data = peer.channel.recv(1 << 20)
        except OSError:  # reset: as good as closed
            data = b""
        if not data:
            if not self._over:
                self._fail(peer.rank, GONE)
            return False
        peer.heard = self._clock
        peer.received += data
        while len(peer.received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(peer.received)
            if length > _MOST:
                self._fail(peer.rank, _UNINTELLIGIBLE)
                return False
            if len(peer.received) < _LENGTH.size + length:
                break
            frame = bytes(peer.received[_LENGTH.size : _LENGTH.size + length])
            del peer.received[: _LENGTH.size + length]
            try:
                self._frame(peer, json.loads(frame))
            except (ValueError, KeyError, TypeError):
                self._fail(peer.rank, _UNINTELLIGIBLE)
                return False
        return True

    def _frame(self, peer: _Peer, frame: dict[str, Any]) -> None:
        if "value" in frame:
            self._part(peer.rank, frame["value"], frame["last"])
        elif "values" in frame:
            self._complete(frame["values"], frame["last"])
        elif "failed" in frame:
            self._fail(frame["failed"], frame["why"])
        elif frame["alive"] is None or frame["alive"] != peer.progress:
            peer.progress = frame["alive"]
            peer.moved = peer.heard

    def _judge(self) -> None:
        for peer in self._peers.values():
            if self._clock - peer.heard > self.timeout:
                self._fail(peer.rank, f"gave no sign of life for {self.timeout:g} s: see what it does")
            elif peer.progress is not None and self._clock - peer.moved > self.timeout:
                self._fail(
                    peer.rank, f"has not loaded anything for {self.timeout:g} s: see what it waits for"
                )

    def _fail(self, rank: int, why: str) -> None:
        with self._change:
            if self.failure is not None or self._over or self._closing:
                return
            self.failure = LoadError(f"loading together stopped, because rank {rank} {why}")
            self._change.notify_all()
        if self.rank == self.hub:
            self._tell({"failed": rank, "why": why}, but=rank)
        self.on_failure()
