"""Nobody without the secret, or a certificate of the cluster's authority, gets a byte over the wire."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.certificates import Authority
from support.peers import KEYS, SECRET, Held, answer, asking, connection, held, peer, read, send_get

from headrace.cache.cluster import Cluster, ClusterSettings
from headrace.cache.errors import NotAuthenticated, PeerError
from headrace.cache.peers import tokens
from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.protocol import Ask
from headrace.cache.peers.security import Secret, Security, SecurityFiles
from headrace.cache.peers.server import PeerServer
from headrace.cache.store import Store
from headrace.cache.tracker.protocol import Peer

MINE = Secret.of(SECRET)


def asks(one: Held) -> list[Ask]:
    """Everything that can be asked for."""
    return [
        Ask("ping"),
        Ask("chunks", one.domain, one.id, 0, 1),
        Ask("digests", one.domain, one.id, 0, 1),
        Ask("held", one.domain, one.snapshot),
        Ask("manifest", one.domain, one.snapshot),
    ]


def attempt(server: PeerServer, path: str, token: str | None, host: str | None = None) -> tuple[int, bytes]:
    """What a plain request gets."""
    headers = [f"Host: {server.address if host is None else host}"]
    if token is not None:
        headers.append(f"Authorization: {token}")
    with connection(server) as sock:
        send_get(sock, path, *headers)
        status, _, body = answer(sock)
        if status == 401:
            assert sock.recv(1) == b""  # and the connection ends
        return status, body


def good(server: PeerServer, path: str, secret: Secret = MINE, now: float | None = None) -> str:
    return tokens.make(secret, "GET", server.address, path, time.time() if now is None else now)


@pytest.fixture
def filled(one: Held) -> Held:
    one.fill()
    return one


def test_the_right_token_opens_everything(server: PeerServer, filled: Held) -> None:
    for ask in asks(filled):
        assert attempt(server, ask.path, good(server, ask.path))[0] == 200


def test_without_a_token_nothing_is_given(server: PeerServer, filled: Held) -> None:
    for ask in asks(filled):
        status, body = attempt(server, ask.path, None)
        assert status == 401
        assert b"secret file" in body
        assert filled.content[:10] not in body


def test_with_a_wrong_secret_nothing_is_given(server: PeerServer, filled: Held) -> None:
    for ask in asks(filled):
        assert attempt(server, ask.path, good(server, ask.path, Secret.of("not the secret at all")))[0] == 401


def test_a_token_is_taken_once(server: PeerServer, filled: Held) -> None:
    for ask in asks(filled):
        token = good(server, ask.path)
        assert attempt(server, ask.path, token)[0] == 200
        status, body = attempt(server, ask.path, token)
        assert (status, b"used before" in body) == (401, True)


@pytest.mark.parametrize(("seconds", "said"), [(-120, b"120 s behind"), (300, b"300 s ahead")])
def test_an_expired_or_early_token_says_how_far_the_clocks_are_apart(
    server: PeerServer, filled: Held, seconds: float, said: bytes
) -> None:
    path = Ask("chunks", filled.domain, filled.id, 0, 1).path
    status, body = attempt(server, path, good(server, path, now=time.time() + seconds + 0.4))
    assert (status, said in body) == (401, True), body


def test_a_token_opens_no_other_path(server: PeerServer, filled: Held) -> None:
    token = good(server, Ask("chunks", filled.domain, filled.id, 0, 1).path)
    other = Ask("chunks", filled.domain, filled.id, 0, 2).path
    assert attempt(server, other, token)[0] == 401


def test_a_token_opens_no_other_trust_domain(store: Store) -> None:
    secrets = {"default": "the secret of one domain", "tenant": "the secret of another"}
    both = Security.shared(**secrets)
    with PeerServer(store, both) as server:
        for name in secrets:
            made = held(store, domain=name)
            made.fill()
            path = Ask("chunks", name, made.id, 0, 1).path
            for signed_by in secrets:
                token = good(server, path, both.secrets[signed_by][0])
                assert attempt(server, path, token)[0] == (200 if signed_by == name else 401)
            made.close()


def test_a_domain_without_a_secret_is_closed_where_another_has_one(store: Store, filled: Held) -> None:
    with PeerServer(store, Security.shared(tenant="a secret of another domain")) as server:
        path = Ask("chunks", "default", filled.id, 0, 1).path
        assert attempt(server, path, None)[0] == 401
        assert attempt(server, path, good(server, path))[0] == 401


def test_a_token_for_one_node_opens_no_other_that_knows_its_own_address(store: Store, filled: Held) -> None:
    path = Ask("chunks", filled.domain, filled.id, 0, 1).path
    with PeerServer(store, KEYS) as first, PeerServer(store, KEYS, names=["10.0.0.2:7070"]) as second:
        stolen = good(first, path)
        assert attempt(second, path, stolen, host=first.address)[0] == 401
        assert attempt(second, path, stolen, host="10.0.0.2:7070")[0] == 401
        meant = tokens.make(MINE, "GET", "10.0.0.2:7070", path, time.time())
        assert attempt(second, path, meant, host="10.0.0.2:7070")[0] == 200


def test_who_is_refused_learns_nothing_of_what_is_there(server: PeerServer, filled: Held) -> None:
    here = Ask("chunks", filled.domain, filled.id, 0, 1).path
    for path in (here, here.replace(filled.id, 64 * "0"), here.replace("default", "nobody")):
        assert attempt(server, path, None)[0] == 401


def test_refusals_are_counted_and_neither_logs_nor_errors_show_a_secret(
    server: PeerServer, filled: Held, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = Security.shared(default="the wrong secret, twice")
    for security in (wrong, Security()):
        with pytest.raises(NotAuthenticated) as caught:
            asking(lambda c: c.held(peer(server), "default", filled.snapshot, 4), security)
        assert "wrong secret" not in str(caught.value)
        assert SECRET not in str(caught.value)
    assert server.stats().refused == 2
    assert "wrong secret" not in caplog.text
    assert SECRET not in caplog.text


def test_secrets_can_be_changed_one_node_after_the_other(store: Store, filled: Held, tmp_path: Path) -> None:
    def reading(*lines: str) -> Security:
        (tmp_path / "secret").write_text("\n".join(lines))
        return SecurityFiles({"default": str(tmp_path / "secret")}).load()

    old, new = "the secret until now", "the secret from now on"
    stages = [reading(old), reading(old, new), reading(new, old), reading(new)]
    with PeerServer(store, stages[0]) as server:
        for step, security in enumerate(stages):
            server.reload(security)
            # The asking node is at the same step, or one before or after.
            for other in stages[max(0, step - 1) : step + 2]:
                asking(lambda c: c.held(peer(server), "default", filled.snapshot, 4), other)
        with pytest.raises(NotAuthenticated):
            asking(lambda c: c.held(peer(server), "default", filled.snapshot, 4), stages[0])


def test_a_long_run_reads_the_secrets_again_when_they_are_refused(
    store: Store, filled: Held, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text("the secret until now")
    settings = ClusterSettings(Peer("me", "me:1"), security=SecurityFiles({"default": str(file)}))

    async def work(server: PeerServer) -> None:
        cluster = Cluster.open(settings, "default")

        async def ask() -> None:
            await cluster.client.held(peer(server), "default", filled.snapshot, 4)

        try:
            await ask()
            server.reload(Security.shared(default="the secret from now on"))
            # Not changed here, or wrong: it is refused, and the next time, too.
            for text in ("the secret until now", "short"):
                file.write_text(text)
                with pytest.raises(NotAuthenticated):
                    await ask()
            file.write_text("the secret from now on")
            async with asyncio.timeout(60):
                while True:
                    with suppress(NotAuthenticated):
                        await ask()
                        break
                    await asyncio.sleep(0.05)
            await asyncio.gather(*(ask() for _ in range(8)))
        finally:
            await cluster.close()

    with PeerServer(store, Security.shared(default="the secret until now")) as server:
        asyncio.run(work(server))


def test_a_client_takes_other_secrets_while_it_runs(server: PeerServer) -> None:
    async def work(client: PeerClient) -> None:
        with pytest.raises(NotAuthenticated):
            await client.ping(peer(server))
        client.reload(KEYS)
        await client.ping(peer(server))

    asking(work, Security())


def test_reloading_to_nothing_beyond_loopback_is_refused_and_changes_nothing(
    store: Store, filled: Held
) -> None:
    with PeerServer(store, KEYS, listen=("0.0.0.0", 0)) as server:
        with pytest.raises(NotAuthenticated, match="refusing"):
            server.reload(Security())
        port = server.address.rsplit(":", 1)[1]
        with pytest.raises(NotAuthenticated):
            asking(lambda c: c.ping(Peer("", f"127.0.0.1:{port}")), Security())


# -- mutual TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "cluster")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "foreign")


@pytest.fixture
def tls_server(store: Store, filled: Held, authority: Authority) -> Iterator[PeerServer]:
    with PeerServer(store, authority.node("server").load()) as server:
        yield server


def read_by(server: PeerServer, one: Held, security: Security) -> bytes:
    found = bytearray()
    asking(
        lambda c: c.read_to(peer(server), one.domain, one.id, 0, 4, len(one.content), found.extend), security
    )
    return bytes(found)


def test_a_node_with_a_certificate_reads_everything(
    tls_server: PeerServer, filled: Held, authority: Authority
) -> None:
    security = authority.node("client").load()
    assert read_by(tls_server, filled, security) == filled.content
    assert asking(lambda c: c.manifest(peer(tls_server), "default", filled.snapshot), security)


@pytest.mark.parametrize("who", ["nobody", "foreign", "mixed", "expired"])
def test_a_node_without_the_right_certificate_reads_nothing(
    tls_server: PeerServer, filled: Held, authority: Authority, foreign: Authority, who: str
) -> None:
    ours, theirs = authority.node("client"), foreign.node("client")
    files = {
        "foreign": theirs,
        # Believes the server, and shows a certificate that the server does not believe.
        "mixed": SecurityFiles(ca=ours.ca, certificate=theirs.certificate, key=theirs.key),
        "expired": authority.node("old", days=-1),
    }.get(who)
    security = Security() if files is None else files.load()
    with pytest.raises((NotAuthenticated, PeerError)) as caught:
        read_by(tls_server, filled, security)
    if files is not None:
        assert isinstance(caught.value, NotAuthenticated), caught.value
        assert "certificates" in str(caught.value)
    assert tls_server.stats().sent["demand"] == 0


def test_tls_without_any_client_certificate_is_refused(tls_server: PeerServer, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.file))
    context.check_hostname = False
    with (
        connection(tls_server) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(sock) as wrapped,
    ):
        send_get(wrapped, "/v1/ping")
        if not wrapped.recv(1):
            raise ConnectionError("closed")


def test_a_client_with_certificates_does_not_believe_a_server_without(
    server: PeerServer, filled: Held, authority: Authority, foreign: Authority, store: Store
) -> None:
    with pytest.raises(NotAuthenticated, match="mutual TLS"):
        read_by(server, filled, authority.node("client").load())
    with PeerServer(store, foreign.node("server").load()) as other, pytest.raises(NotAuthenticated):
        read_by(other, filled, authority.node("client").load())


def test_with_certificates_and_secrets_both_are_demanded(
    store: Store, filled: Held, authority: Authority
) -> None:
    both = Security(KEYS.secrets, authority.node("server"))
    with PeerServer(store, both) as server:
        assert read_by(server, filled, Security(KEYS.secrets, authority.node("client"))) == filled.content
        with pytest.raises(NotAuthenticated, match="token"):
            read_by(server, filled, Security({}, authority.node("client")))
        with pytest.raises((NotAuthenticated, PeerError)):
            read_by(server, filled, KEYS)


def test_a_handshake_that_does_not_come_is_given_up(store: Store, authority: Authority) -> None:
    from headrace.cache.peers.serving import ServerLimits

    with PeerServer(store, authority.node("server").load(), limits=ServerLimits(head=0.2)) as server:
        with connection(server) as sock:
            assert sock.recv(1) == b""
        timeouts = PeerTimeouts(connect=5)
        assert asking(lambda c: c.ping(peer(server)), authority.node("client").load(), timeouts=timeouts)


def test_a_server_with_certificates_can_be_stopped_during_a_handshake(
    store: Store, authority: Authority
) -> None:
    server = PeerServer(store, authority.node("server").load())
    server.start()
    with connection(server):
        server.stop()


def test_certificates_can_be_exchanged_while_it_runs(
    store: Store, filled: Held, authority: Authority, foreign: Authority
) -> None:
    with PeerServer(store, authority.node("server").load()) as server:
        assert read_by(server, filled, authority.node("client").load()) == filled.content
        server.reload(foreign.node("server").load())
        assert read_by(server, filled, foreign.node("client").load()) == filled.content
        with pytest.raises(NotAuthenticated):
            read_by(server, filled, authority.node("client").load())


def test_plain_reading_beside_it_is_not_disturbed(server: PeerServer, filled: Held) -> None:
    assert read(server, filled, 0, 4) == filled.content
