"""The peer server: gives what is verified, to those who may have it, within bounds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.peers import KEYS, Held, answer, asking, connection, held, open_files, peer, read, send_get

from headrace.cache.bandwidth import PIECE, Bandwidth, Class
from headrace.cache.errors import NotAuthenticated, PeerBusy, PeerError, PeerMissing, UsageError
from headrace.cache.numbering import Numbering, unpack
from headrace.cache.peers.connection import Connection
from headrace.cache.peers.protocol import MAX_HEAD, Ask
from headrace.cache.peers.security import Security
from headrace.cache.peers.server import PeerServer
from headrace.cache.peers.serving import ServerLimits
from headrace.cache.store import Store

LATE = 60.0
STANDSTILL = 1.0  # a byte per second: what has begun stays where it is
OPEN = Security()


def until(what: Callable[[], bool]) -> None:
    """Wait for something that has to come soon."""
    for _ in range(int(LATE / 0.005)):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come")


# -- what it gives


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (0, 4), (2, 4), (1, 3)])
def test_chunks_arrive_as_they_are(server: PeerServer, one: Held, first: int, last: int) -> None:
    one.fill()
    assert read(server, one, first, last) == one.bytes_of(first, last)
    one.complete()
    assert read(server, one, first, last) == one.bytes_of(first, last)


def test_while_an_object_fills_only_what_is_marked_is_given(server: PeerServer, one: Held) -> None:
    one.fill(1, 2)
    assert read(server, one, 1, 3) == one.bytes_of(1, 3)
    for first, last in ((0, 1), (0, 2), (2, 4), (3, 4), (0, 4)):
        with pytest.raises(PeerMissing):
            read(server, one, first, last)
    one.fill(0)
    assert read(server, one, 0, 3) == one.bytes_of(0, 3)
    one.take_back(1)
    with pytest.raises(PeerMissing):
        read(server, one, 0, 3)


def test_chunks_beyond_the_end_are_missing(store: Store, one: Held) -> None:
    one.fill()
    with PeerServer(store, OPEN) as server, connection(server) as sock:
        for first, last in ((4, 5), (3, 5), (0, 99_999_999)):
            send_get(sock, Ask("chunks", one.domain, one.id, first, last).path)
            assert answer(sock)[0] == 404


def test_the_held_bitmap_is_that_of_the_store(server: PeerServer, store: Store, one: Held) -> None:
    numbering = Numbering.of(one.manifest, one.domain)

    def bits() -> list[int]:
        return unpack(
            asking(lambda c: c.held(peer(server), one.domain, one.snapshot, numbering.chunks)),
            numbering.chunks,
        )

    assert bits() == []
    one.fill(1, 3)
    assert bits() == [1, 3]
    one.fill()
    one.complete()
    assert bits() == [0, 1, 2, 3]


def test_learned_digests_are_told_of_marked_chunks_only(server: PeerServer, one: Held) -> None:
    one.fill(0, 1)
    learned = one.writer().learned.all(4)
    assert asking(lambda c: c.digests(peer(server), one.domain, one.id, 0, 2)) == learned[:2]
    with pytest.raises(PeerMissing):
        asking(lambda c: c.digests(peer(server), one.domain, one.id, 0, 3))


def test_a_manifest_is_given_in_its_stored_form_and_as_it_is_now(server: PeerServer, one: Held) -> None:
    assert asking(lambda c: c.manifest(peer(server), one.domain, one.snapshot)) == one.manifest.to_stored()
    with pytest.raises(PeerMissing):
        asking(lambda c: c.manifest(peer(server), one.domain, 64 * "0"))
    with pytest.raises(PeerMissing):
        asking(lambda c: c.held(peer(server), one.domain, 64 * "0", 4))


def test_a_ping_says_who_answers(server: PeerServer) -> None:
    said = json.loads(asking(lambda c: c.ping(peer(server))))
    assert said["node"] == "node-1"
    assert said["version"].startswith("1.")


def test_what_was_sent_is_counted(server: PeerServer, one: Held) -> None:
    one.fill()
    read(server, one, 0, 2)
    read(server, one, 2, 4, demand=False)
    with pytest.raises(PeerMissing):
        asking(lambda c: c.digests(peer(server), one.domain, 64 * "0", 0, 1))
    until(lambda: server.stats().connections == 0)
    stats = server.stats()
    assert stats.sent == {"demand": len(one.bytes_of(0, 2)), "prestage": len(one.bytes_of(2, 4))}
    assert stats.uploads == {"demand": 1, "prestage": 1}
    assert stats.active == {"demand": 0, "prestage": 0}


# -- objects that change under its feet


def test_an_evicted_object_is_gone_and_one_made_again_is_the_new_one(
    server: PeerServer, store: Store, one: Held, tmp_path: Path
) -> None:
    one.fill()
    assert read(server, one, 0, 4) == one.content
    one.close()
    store.discard(one.folder)
    with pytest.raises(PeerMissing):
        read(server, one, 0, 4)
    one.create()
    with pytest.raises(PeerMissing):
        read(server, one, 0, 1)
    one.fill(2)
    assert read(server, one, 2, 3) == one.bytes_of(2, 3)


def test_the_space_of_an_evicted_object_is_free_soon(server: PeerServer, store: Store, one: Held) -> None:
    one.fill()
    one.complete()
    read(server, one, 0, 4)
    below = store.root / "domains"
    assert open_files(below)
    store.discard(one.folder)
    until(lambda: not open_files(below) and not open_files(store.trash))


def test_a_repaired_object_is_given_as_it_is_now_and_its_scratch_never(
    server: PeerServer, one: Held, tmp_path: Path
) -> None:
    one.fill()
    one.complete()
    assert read(server, one, 0, 4) == one.content
    # As `repair` does it: scratch beside the data, renamed over it at the end.
    scratch = one.folder.partial
    scratch.write_bytes(b"\x55" * len(one.content))
    assert read(server, one, 0, 4) == one.content
    repaired = bytes(reversed(one.content))
    scratch.write_bytes(repaired)
    scratch.chmod(0o444)
    scratch.rename(one.folder.data)
    assert read(server, one, 0, 4) == repaired


def test_an_upload_ends_when_its_chunks_are_taken_back(store: Store, one: Held) -> None:
    one.fill()
    bandwidth = Bandwidth({("peers", "demand"): 4e6})
    with PeerServer(store, OPEN, bandwidth=bandwidth) as server, connection(server) as sock:
        send_get(sock, Ask("chunks", one.domain, one.id, 2, 3).path)
        assert sock.recv(100)
        one.take_back(2)
        bandwidth.set_rate("peers", "demand", None)
        received = 100
        while more := sock.recv(1 << 20):
            received += len(more)
        assert received < 2_500_000


def test_a_damaged_object_is_missing(server: PeerServer, one: Held) -> None:
    one.fill()
    one.close()
    for damage in (one.folder.map, one.folder.grid_file, one.folder.partial):
        before = damage.read_bytes()
        damage.write_bytes(before[: len(before) // 2])
        with pytest.raises(PeerMissing):
            read(server, one, 0, 1)
        damage.write_bytes(before)
    assert read(server, one, 0, 4) == one.content


# -- who asks for something else


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v1", 404),
        ("/v1/", 404),
        ("/v1/default/objects/../../../etc/passwd", 404),
        ("/v1/default/objects/{id}/chunks/0-1/../../data", 404),
        ("/v1/default/objects/{id}/data", 404),
        ("/v1/default/objects/{id}/chunks/0-0", 404),
        ("/v1/default/objects/{id}/chunks/1-0", 404),
        ("/v1/default/objects/{id}/chunks/-1-1", 404),
        ("/v1/default/objects/{id}/chunks/0-1234567890", 404),
        ("/v1/default/objects/{id}/chunks/0-1?x=1", 404),
        ("/v1/default/objects/{ID}/chunks/0-1", 404),
        ("/v1/default/objects/{id}0/chunks/0-1", 404),
        ("/v1/nobody/objects/{id}/chunks/0-1", 404),
        ("/v1/..%2fdefault/objects/{id}/chunks/0-1", 404),
        ("/v1/default%00/objects/{id}/chunks/0-1", 404),
        ("/v1/./objects/{id}/chunks/0-1", 404),
        ("/v2/default/objects/{id}/chunks/0-1", 400),
        ("http://elsewhere/v1/ping", 404),
        ("*", 404),
    ],
)
def test_paths_that_name_nothing_are_refused(shelf: Store, small: Held, path: str, status: int) -> None:
    with PeerServer(shelf, OPEN) as server, connection(server) as sock:
        send_get(sock, path.replace("{id}", small.id).replace("{ID}", small.id.upper()))
        got, headers, body = answer(sock)
        assert got == status
        assert headers["headrace-version"] == "1.0"
        assert body.endswith(b".")
        # And the connection goes on.
        send_get(sock, "/v1/ping")
        assert answer(sock)[0] == 200


def test_another_major_version_is_told_which_one_is_spoken_here(shelf: Store) -> None:
    with PeerServer(shelf, OPEN) as server, connection(server) as sock:
        send_get(sock, "/v2/ping", "Headrace-Version: 2.0")
        status, _, body = answer(sock)
        assert status == 400
        assert b"version 2 " in body
        assert b"1.0" in body


def test_a_newer_minor_version_is_understood(shelf: Store, small: Held) -> None:
    with PeerServer(shelf, OPEN) as server, connection(server) as sock:
        send_get(
            sock,
            Ask("chunks", small.domain, small.id, 1, 2).path,
            "Headrace-Version: 1.7",
            "Headrace-Class: urgent-later",
            "Headrace-Something: else",
        )
        assert answer(sock)[2] == small.bytes_of(1, 2)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /v1/ping HTTP/1.1\r\n" + b"X: " + b"a" * 2 * MAX_HEAD + b"\r\n\r\n", 400),
        (b"a" * 2 * MAX_HEAD, 400),
        (b"\x16\x03\x01\x02\x00 hello, TLS\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/ping\r\n\r\n", 400),
        (b"GET /v1/ping HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v1/ping HTTP/1.1\r\n folded: line\r\n\r\n", 400),
        (b"POST /v1/ping HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
    ],
    ids=["huge header", "no end", "TLS", "nonsense", "no version", "no colon", "folded", "POST", "empty"],
)
def test_what_is_no_request_is_refused(shelf: Store, request_: bytes, status: int) -> None:
    with PeerServer(shelf, OPEN) as server:
        with connection(server) as sock:
            sock.sendall(request_)
            assert answer(sock)[0] == status
        assert json.loads(asking(lambda c: c.ping(peer(server)), OPEN))


def test_requests_can_be_sent_before_the_answers_are_read(shelf: Store, small: Held) -> None:
    with PeerServer(shelf, OPEN) as server, connection(server) as sock:
        paths = [Ask("chunks", small.domain, small.id, n, n + 1).path for n in (1, 0)]
        sock.sendall("".join(f"GET {p} HTTP/1.1\r\n\r\n" for p in paths).encode())
        got = b""
        while not got.endswith(small.bytes_of(0, 1)):
            got += sock.recv(1 << 20)
        assert small.bytes_of(1, 2) in got


# -- bounds


def slow_upload(server: PeerServer, one: Held, of: Class = "demand") -> socket.socket:
    """A reader that takes nothing of the largest chunk: its slot stays taken until it is closed."""
    host, port = server.address.rsplit(":", 1)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(LATE)
    sock.connect((host, int(port)))
    before = server.stats().active[of]
    send_get(sock, Ask("chunks", one.domain, one.id, 0, one.chunks).path, f"Headrace-Class: {of}")
    until(lambda: server.stats().active[of] > before)
    return sock


def test_without_a_free_slot_it_says_so_and_how_long_the_queue_is(shelf: Store, large: Held) -> None:
    with PeerServer(shelf, OPEN, slots=2) as server:
        with slow_upload(server, large), slow_upload(server, large), connection(server) as sock:
            send_get(sock, Ask("chunks", large.domain, large.id, 0, 1).path)
            status, headers, body = answer(sock)
            assert status == 503
            assert headers["headrace-queue"] == "2"
            assert int(headers["retry-after"]) >= 1
            assert 0 < float(headers["headrace-retry-after"]) <= 2
            assert b"slots" in body
            # Whoever asks for something small is answered all the same.
            send_get(sock, "/v1/ping")
            assert answer(sock)[0] == 200
            with pytest.raises(PeerBusy) as caught:
                read_open(server, large)
            assert caught.value.queue == 2
            assert 0 < caught.value.retry_after <= 2
        until(lambda: server.stats().active["demand"] == 0)
        assert read_open(server, large) == large.content
        assert server.stats().busy == 2


def test_a_chunk_that_two_nodes_get_slowly_is_left_to_them_but_not_by_what_comes_before(
    shelf: Store, large: Held
) -> None:
    """Else a slow node sends the chunk that only it has to all others at once, and all have it late."""

    def refused(of: Class) -> bool:
        with connection(server) as sock:
            send_get(
                sock, Ask("chunks", large.domain, large.id, 0, large.chunks).path, f"Headrace-Class: {of}"
            )
            head = sock.recv(12)
            assert head in (b"HTTP/1.1 200", b"HTTP/1.1 503")
            return head.endswith(b"503")

    with (
        PeerServer(shelf, OPEN, slots=8) as server,
        slow_upload(server, large, "prestage"),
        slow_upload(server, large, "prestage"),
    ):
        until(lambda: refused("prestage"))
        assert not refused("demand")
        with connection(server) as sock:
            send_get(sock, Ask("chunks", large.domain, large.id, 1, 2).path, "Headrace-Class: prestage")
            assert answer(sock)[0] == 200


def read_open(server: PeerServer, one: Held, *, demand: bool = True) -> bytes:
    found = bytearray()
    asking(
        lambda c: c.read_to(
            peer(server), one.domain, one.id, 0, one.chunks, len(one.content), found.extend, demand=demand
        ),
        OPEN,
    )
    return bytes(found)


def test_prestage_gets_only_what_demand_leaves_and_never_stands_in_its_way(shelf: Store, large: Held) -> None:
    with PeerServer(shelf, OPEN, slots=2) as server:
        with slow_upload(server, large, "prestage"), slow_upload(server, large, "prestage"):
            with pytest.raises(PeerBusy):
                read_open(server, large, demand=False)
            assert read_open(server, large) == large.content
            with slow_upload(server, large), slow_upload(server, large):
                assert server.stats().active == {"demand": 2, "prestage": 2}
        until(lambda: sum(server.stats().active.values()) == 0)
        with slow_upload(server, large):
            assert read_open(server, large, demand=False) == large.content
            with slow_upload(server, large), pytest.raises(PeerBusy):
                read_open(server, large, demand=False)


@pytest.mark.parametrize("paused", [False, True])
def test_a_reader_that_goes_away_frees_its_slot_at_once(shelf: Store, large: Held, paused: bool) -> None:
    bandwidth = Bandwidth()
    if paused:
        bandwidth.set_rate("peers", "demand", STANDSTILL)
    with PeerServer(shelf, OPEN, slots=1, bandwidth=bandwidth) as server:
        slow_upload(server, large).close()
        until(lambda: server.stats().active["demand"] == 0)
        bandwidth.set_rate("peers", "demand", None)
        assert read_open(server, large) == large.content


def test_a_reader_that_is_too_slow_is_dropped(shelf: Store, large: Held) -> None:
    with (
        PeerServer(shelf, OPEN, slots=1, limits=ServerLimits(send=0.2)) as server,
        slow_upload(server, large),
    ):
        until(lambda: server.stats().active["demand"] == 0)


def test_a_reader_that_drips_is_dropped_too(shelf: Store, large: Held) -> None:
    limits = ServerLimits(send=0.3)
    with PeerServer(shelf, OPEN, slots=1, limits=limits) as server, slow_upload(server, large) as sock:
        until(lambda: bool(sock.recv(2048)) and not server.stats().active["demand"])


def test_connections_that_say_nothing_or_too_little_are_closed(shelf: Store) -> None:
    with PeerServer(shelf, OPEN, limits=ServerLimits(idle=0.2, head=0.2)) as server:
        with connection(server) as silent:
            assert silent.recv(1) == b""
        with connection(server) as slow, pytest.raises(OSError):
            while True:
                slow.sendall(b"GET /v1/ping HTTP/1.1\r\nX: y\r\n"[:1])
                time.sleep(0.03)


def test_more_connections_than_there_may_be_are_closed_and_the_others_go_on(shelf: Store) -> None:
    limits = ServerLimits(connections=3)
    with PeerServer(shelf, OPEN, limits=limits) as server, ExitStack() as stack:
        three = [stack.enter_context(connection(server)) for _ in range(3)]
        for sock in three:
            send_get(sock, "/v1/ping")
            assert answer(sock)[0] == 200
        with connection(server) as more:
            assert more.recv(1) == b""
        send_get(three[0], "/v1/ping")
        assert answer(three[0])[0] == 200


def test_uploads_go_at_the_rate_of_their_class_and_a_change_reaches_them(shelf: Store, large: Held) -> None:
    bandwidth = Bandwidth({("peers", "prestage"): STANDSTILL})
    with PeerServer(shelf, OPEN, bandwidth=bandwidth) as server:
        done = threading.Event()

        def fetch() -> None:
            assert read_open(server, large, demand=False) == large.content
            done.set()

        thread = threading.Thread(target=fetch)
        thread.start()
        until(lambda: server.stats().active["prestage"] == 1)
        assert read_open(server, large) == large.content
        assert server.stats().sent["prestage"] <= PIECE
        bandwidth.set_rate("peers", "prestage", 1e9)
        assert done.wait(LATE)
        thread.join()


def test_a_paused_class_is_told_so_rather_than_kept_waiting(shelf: Store, small: Held) -> None:
    bandwidth = Bandwidth({("peers", "prestage"): 0.0})
    with PeerServer(shelf, OPEN, bandwidth=bandwidth) as server:
        with pytest.raises(PeerBusy, match="paused"):
            read_open(server, small, demand=False)
        assert read_open(server, small) == small.content
        bandwidth.set_rate("peers", "prestage", None)
        assert read_open(server, small, demand=False) == small.content


# -- life


def test_stopping_lets_uploads_end_and_refuses_new_ones(shelf: Store, large: Held) -> None:
    bandwidth = Bandwidth({("peers", "demand"): STANDSTILL})
    server = PeerServer(shelf, OPEN, bandwidth=bandwidth)
    server.start()
    address = server.address
    received: list[bytes] = []
    fetching = threading.Thread(target=lambda: received.append(read_open(server, large)))
    fetching.start()
    until(lambda: server.stats().active["demand"] == 1)
    host, port = address.rsplit(":", 1)
    with connection(server) as rested:
        send_get(rested, "/v1/ping")
        answer(rested)
        stopping = threading.Thread(target=server.stop, args=(LATE,))
        stopping.start()
        assert rested.recv(1) == b""
        with pytest.raises(OSError), socket.create_connection((host, int(port)), LATE):
            pass
        bandwidth.set_rate("peers", "demand", None)
        stopping.join(LATE)
        fetching.join(LATE)
    assert received == [large.content]
    assert not open_files(shelf.root / "domains")


def test_stopping_without_patience_cuts_uploads(shelf: Store, large: Held) -> None:
    with PeerServer(shelf, OPEN) as server, slow_upload(server, large) as sock:
        server.stop()
        with pytest.raises((EOFError, ConnectionError)):
            answer(sock)


def test_a_server_can_be_stopped_twice_and_before_it_was_started(shelf: Store) -> None:
    server = PeerServer(shelf, OPEN)
    server.stop()
    server.start()
    server.stop()
    server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_it_does_not_listen_beyond_loopback_without_a_secret(shelf: Store, host: str) -> None:
    with pytest.raises(NotAuthenticated, match="refusing to listen"):
        PeerServer(shelf, OPEN, listen=(host, 0)).start()


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        ("192.0.2.1", 0, "not an address of this machine"),
        ("no-such-host.invalid", 0, "cannot listen"),
        ("127.0.0.1", 70_000, "up to 65535"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_named(
    shelf: Store, host: str, port: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        PeerServer(shelf, KEYS, listen=(host, port)).start()
    assert host in str(caught.value)


def test_a_port_that_is_taken_is_named(store: Store, server: PeerServer) -> None:
    host, port = server.address.rsplit(":", 1)
    with pytest.raises(UsageError, match="another program"):
        PeerServer(store, KEYS, listen=(host, int(port))).start()


def test_ipv6_is_an_address_as_any_other(store: Store, one: Held) -> None:
    one.fill()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with PeerServer(store, KEYS, listen=("::1", 0)) as server:
        assert server.address.startswith("[::1]:")
        assert read(server, one, 0, 4) == one.content


def test_a_store_of_another_domain_is_served_too(store: Store) -> None:
    made = held(store, domain="tenant a")
    made.fill()
    with PeerServer(store, Security.shared(**{"tenant a": "the tenant's own secret"})) as server:
        found = bytearray()
        asking(
            lambda c: c.read_to(peer(server), "tenant a", made.id, 0, 4, len(made.content), found.extend),
            Security.shared(**{"tenant a": "the tenant's own secret"}),
        )
        assert found == made.content
    made.close()


def test_an_error_of_the_peer_is_one_sentence(shelf: Store) -> None:
    with PeerServer(shelf, OPEN) as server, pytest.raises(PeerError) as caught:
        asking(lambda c: c.digests(peer(server), "nobody", 64 * "a", 0, 1), OPEN)
    assert str(caught.value).count(". ") == 0
    assert server_free(str(caught.value))


def server_free(text: str) -> bool:
    """No path of the server's machine in it."""
    return "/tmp" not in text and "/domains" not in text


def test_a_connection_that_comes_to_rest_just_when_the_server_stops_keeps_nobody_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming, looked = threading.Event(), threading.Event()

    class Late(Connection):
        """Comes to rest when the server has looked for those that rest."""

        @property
        def idle(self) -> bool:
            return self._idle

        @idle.setter
        def idle(self, idle: bool) -> None:
            if idle:
                coming.set()
                looked.wait(LATE)
            self._idle = idle

    monkeypatch.setattr("headrace.cache.peers.server.Connection", Late)
    server = PeerServer(store)
    server.start()
    with connection(server) as sock:
        assert coming.wait(LATE)
        stopping = threading.Thread(target=server.stop, args=(LATE,))
        stopping.start()
        time.sleep(0.2)
        looked.set()
        assert sock.recv(1) == b""
        stopping.join()
