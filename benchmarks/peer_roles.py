"""The processes of `peer_transfer.py`: who serves and who fetches, headrace's and the raw socket's.

`python benchmarks/peer_roles.py '<Role as JSON>'`. A server prints its address and serves until standard input
closes; a client prints what it cost, from its first connection until the last byte was written. Imports, making
the target file and reserving its space come before.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Cost, now, pretouch

BLOCK = 1 << 20
_RANGE = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Role:
    """What a process does.

    Attributes:
        name: a key of `ROLES`.
        source: the file (raw) or the store that is served or, by a client of headrace, known of.
        reference: of the model in that store, for a whole staging run.
        address: of the server, for clients.
        target: a folder that does not exist, for clients.
        connections: at once.
        span: bytes of one request, of the raw copy.
        secret: a file, or "".
        touch: use the page cache once before (see `pretouch`); not where memory is limited.
    """

    name: str
    source: str
    reference: str = ""
    address: str = ""
    target: str = ""
    connections: int = 1
    span: int = 16 << 20
    secret: str = ""
    touch: bool = True


# -- raw


def serve_raw(role: Role) -> None:
    """A thread for each connection, `sendfile` for each range that is asked for."""
    fd = os.open(role.source, os.O_RDONLY)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(sock: socket.socket) -> None:
        with sock:
            while asked := sock.recv(_RANGE.size, socket.MSG_WAITALL):
                start, stop = _RANGE.unpack(asked)
                while start < stop:
                    start += os.sendfile(sock.fileno(), fd, start, stop - start)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    sys.stdin.read()


def copy_raw(role: Role) -> Cost:
    """recv_into a reused block, pwrite into a preallocated file."""
    size = os.stat(role.source).st_size
    target = Path(role.target)
    target.mkdir()
    if role.touch:
        pretouch(target, 2 * size)
    fd = os.open(target / "copy", os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, size)
    host, port = role.address.rsplit(":", 1)
    ranges: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for start in range(0, size, role.span):
        ranges.put((start, min(size, start + role.span)))

    def work() -> None:
        block = memoryview(bytearray(BLOCK))
        with socket.create_connection((host, int(port))) as sock:
            while True:
                try:
                    start, stop = ranges.get_nowait()
                except queue.Empty:
                    return
                sock.sendall(_RANGE.pack(start, stop))
                while start < stop:
                    count = sock.recv_into(block, min(BLOCK, stop - start), socket.MSG_WAITALL)
                    if os.pwrite(fd, block[:count], start) != count or not count:
                        raise OSError("short copy")
                    start += count

    begin = now()
    threads = [threading.Thread(target=work) for _ in range(role.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return now() - begin


# -- headrace


def serve(role: Role) -> None:
    """The peer server over a store."""
    from headrace.cache.peers.security import SecurityFiles
    from headrace.cache.peers.server import PeerServer
    from headrace.cache.store import Store

    files = SecurityFiles({"default": role.secret}) if role.secret else SecurityFiles()
    with (
        Store.open(role.source, writable=False) as store,
        PeerServer(store, files.load(), slots=64) as server,
    ):
        print(server.address, flush=True)
        sys.stdin.read()


def fetch(role: Role) -> Cost:
    """Every chunk of the one snapshot in `source` over the peer client and the stager's own way into a store."""
    from headrace.cache import object as objects
    from headrace.cache.filling import ChunkSink, Filling
    from headrace.cache.numbering import Numbering
    from headrace.cache.object import ObjectSpec, ObjectWriter
    from headrace.cache.peers.client import PeerClient
    from headrace.cache.peers.security import SecurityFiles
    from headrace.cache.progress import Progress
    from headrace.cache.store import Store
    from headrace.cache.tracker.protocol import Peer

    with Store.open(role.source, writable=False) as known:
        manifest = next(known.domain().snapshots()).manifest()
    files = SecurityFiles({"default": role.secret}) if role.secret else SecurityFiles()
    security = files.load()
    if role.touch:
        Path(role.target).mkdir()
        pretouch(Path(role.target), 2 * manifest.size)
    with Store.open(role.target) as store:
        domain = store.domain()
        numbering = Numbering.of(manifest, domain.name)
        progress, fillings = Progress(), {}
        for object_id, file in zip(numbering.ids, numbering.files, strict=True):
            key = file.content_key(manifest.uri, manifest.algorithm)
            spec = ObjectSpec(object_id, key, file.grid, manifest.algorithm)
            objects.create(spec, domain.object(object_id), store.tmp)
            writer = ObjectWriter(domain.object(object_id), spec)
            writer.allocate()
            fillings[object_id] = Filling(file, writer)

        async def all_chunks() -> Cost:
            client = PeerClient(security)
            peer = Peer("", role.address)
            numbers = iter(range(numbering.chunks))

            async def work() -> None:
                for number in numbers:
                    at, index = numbering.locate(number)
                    object_id = numbering.ids[at]
                    filling = fillings[object_id]
                    if not filling.claim(index, index + 1):
                        raise RuntimeError("claimed elsewhere")
                    sink = ChunkSink(filling, index, progress, "peer")
                    size = numbering.sizes[number]
                    await client.read_to(peer, domain.name, object_id, index, index + 1, size, sink.put)
                    filling.release(index, index + 1)

            begin = now()
            async with asyncio.TaskGroup() as group:
                for _ in range(role.connections):
                    group.create_task(work())
            cost = now() - begin
            await client.close()
            return cost

        cost = asyncio.run(all_chunks())
        for filling in fillings.values():
            if not filling.full:
                raise RuntimeError("not everything was marked")
            filling.writer.close()
    return cost


def stage(role: Role) -> Cost:
    """A whole staging run that takes part in a cluster of two: from its start until the last chunk is marked."""
    from benchmarks.marks import Sampled

    from headrace.cache import origins, stager, staging, swarm  # noqa: F401
    from headrace.cache.cluster import ClusterSettings
    from headrace.cache.peers.security import SecurityFiles
    from headrace.cache.prepare import StageRequest
    from headrace.cache.tracker.protocol import Peer

    if role.touch:
        Path(role.target).mkdir()
        pretouch(Path(role.target), 2 * sum(p.stat().st_size for p in Path(role.reference).iterdir()))
    settings = ClusterSettings(
        Peer("fetching", "127.0.0.1:1"),
        static=(Peer("serving", role.address),),
        security=SecurityFiles({"default": role.secret}) if role.secret else SecurityFiles(),
    )
    progress = Sampled()
    begin = now()
    request = StageRequest(role.reference, role.target, workers=1)
    report = staging.run(staging.StagingJob(request, progress, cluster=settings))
    if report.sources["peer"] != report.bytes:
        raise RuntimeError(f"not everything came from the peer: {report.sources}")
    assert progress.at_last_mark is not None
    return progress.at_last_mark - begin


SERVERS: dict[str, Callable[[Role], None]] = {"raw": serve_raw, "headrace": serve}
CLIENTS: dict[str, Callable[[Role], Cost]] = {"raw": copy_raw, "headrace": fetch, "stage": stage}


def main() -> int:
    role = Role(**json.loads(sys.argv[1]))
    if role.address:
        print(json.dumps(asdict(CLIENTS[role.name](role))))
    else:
        SERVERS[role.name](role)
    return 0


if __name__ == "__main__":
    sys.exit(main())
