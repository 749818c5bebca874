"""A store whose chunks a test sets one by one, its peer server, and plain requests to it."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headrace.cache import object as objects
from headrace.cache.chunkmap import ABSENT
from headrace.cache.digest import chunk_digest
from headrace.cache.grid import Grid
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter
from headrace.cache.origins.protocol import Pin
from headrace.cache.peers.client import PeerClient
from headrace.cache.peers.security import Security
from headrace.cache.peers.server import PeerServer
from headrace.cache.store import DEFAULT_DOMAIN, Store
from headrace.cache.tracker.protocol import Peer

T = TypeVar("T")

SECRET = "a secret that only tests know"
KEYS = Security.shared(default=SECRET)


@dataclass
class Held:
    """One file of a snapshot in a store, with the bytes that it is to have."""

    store: Store
    manifest: Manifest
    file: ManifestFile
    content: bytes
    domain: str = DEFAULT_DOMAIN
    _writer: ObjectWriter | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        return self.manifest.object_id(self.domain, self.file)

    @property
    def snapshot(self) -> str:
        return self.manifest.snapshot_id(self.domain)

    @property
    def folder(self) -> ObjectFolder:
        return self.store.domain(self.domain).object(self.id)

    @property
    def chunks(self) -> int:
        return len(self.file.grid)

    def bytes_of(self, first: int, last: int) -> bytes:
        start, stop = self.file.grid.span(first, last)
        return self.content[start:stop]

    def create(self) -> None:
        spec = ObjectSpec(
            self.id,
            self.file.content_key(self.manifest.uri, self.manifest.algorithm),
            self.file.grid,
            self.manifest.algorithm,
        )
        objects.create(spec, self.folder, self.store.tmp)
        self.store.domain(self.domain).make_snapshot(self.manifest, self.store.tmp)

    def writer(self) -> ObjectWriter:
        if self._writer is None:
            self.create()
            self._writer = ObjectWriter(self.folder, self.folder.spec())
        return self._writer

    def fill(self, *indexes: int) -> None:
        """Write chunks, then mark them, as a stager does; none: all."""
        writer = self.writer()
        for index in indexes or range(self.chunks):
            data = self.bytes_of(index, index + 1)
            writer.write(data, self.file.grid.offsets[index])
            writer.mark(index, chunk_digest(self.manifest.algorithm, data))

    def take_back(self, index: int) -> None:
        """As after a failed sync: the mark goes, and the bytes cannot be relied on."""
        writer = self.writer()
        writer.map.mark(index, ABSENT)
        writer.write(b"\xee" * self.file.grid.lengths[index], self.file.grid.offsets[index])

    def complete(self) -> None:
        assert self.writer().try_complete()
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def held(
    store: Store,
    lengths: Iterable[int] = (70_000, 10, 2_500_000, 1 << 20),
    *,
    seed: int = 1,
    name: str = "weights.bin",
    domain: str = DEFAULT_DOMAIN,
) -> Held:
    """A file with random content, of which nothing is in the store yet."""
    grid = Grid(tuple(lengths))
    content = random.Random(seed).randbytes(grid.size)
    file = ManifestFile(name, grid.size, grid, pin=Pin("etag", f'"{seed}"'))
    return Held(store, Manifest((file,), uri=f"s3://bucket/{seed}"), file, content, domain)


@contextmanager
def store_in(folder: Path) -> Iterator[Store]:
    with Store.open(folder / "store") as store:
        yield store


def peer(server: PeerServer) -> Peer:
    return Peer("node", server.address)


def asking(work: Callable[[PeerClient], Awaitable[T]], security: Security = KEYS, **options: Any) -> T:
    """Run `work` with a client that is closed afterwards."""

    async def run() -> T:
        client = PeerClient(security, **options)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def read(server: PeerServer, one: Held, first: int, last: int, *, demand: bool = True) -> bytes:
    """Chunks over a client of its own."""
    found = bytearray()
    length = sum(one.file.grid.lengths[first:last])

    async def work(client: PeerClient) -> None:
        await client.read_to(
            peer(server), one.domain, one.id, first, last, length, found.extend, demand=demand
        )

    asking(work)
    return bytes(found)


@contextmanager
def connection(server: PeerServer, *, receive_buffer: int = 0) -> Iterator[socket.socket]:
    """A plain socket to a server."""
    host, port = server.address.rsplit(":", 1)
    with socket.socket() as sock:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(30)
        sock.connect((host, int(port)))
        yield sock


def send_get(sock: socket.socket, path: str, *headers: str) -> None:
    sock.sendall("\r\n".join([f"GET {path} HTTP/1.1", *headers, "", ""]).encode())


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by lower-case name, and the whole body."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise EOFError(f"closed after {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers["content-length"]):
        more = sock.recv(65536)
        if not more:
            raise EOFError(f"closed after {len(body)} bytes of the body")
        body += more
    return int(first.split()[1]), headers, body


def open_files(folder: Path) -> list[str]:
    """Descriptors of this process below a folder, deleted files too."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found
