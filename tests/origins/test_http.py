"""The contract on a real web server (nginx), and how plain HTTP differs: pages, TLS, no pins."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.faulty_server import Fault, FaultyServer
from support.nginx import BINARY, Nginx
from support.origin_contract import OriginContract, RawOrigin, payload, read

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, NotFound, OriginChanged, OriginMisconfigured, UsageError
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("both_ways")]
T = TypeVar("T")
_numbers = itertools.count()


class FilesRaw(RawOrigin):
    """Files below a directory that nginx serves."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url

    def put(self, path: str, data: bytes) -> None:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        # nginx's ETag is made of the time (in seconds) and the size: a new time for new content.
        stamp = 1_700_000_000 + next(_numbers)
        os.utime(file, (stamp, stamp))

    def get(self, path: str) -> bytes:
        return (self.directory / path).read_bytes()

    def delete(self, path: str) -> None:
        (self.directory / path).unlink()

    def uri(self, path: str) -> str:
        return f"{self.url}/{quote(path)}"


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    if BINARY is None:
        pytest.skip("nginx is not installed")
    with Nginx(tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("nginx")) as server:
        yield server


class TestNginx(OriginContract):
    writable = False

    @pytest.fixture
    def raw(self, nginx: Nginx) -> RawOrigin:
        name = f"test-{next(_numbers)}"
        (nginx.root / name).mkdir()
        return FilesRaw(nginx.root / name, f"{nginx.url}/{name}")


class MemoryRaw(RawOrigin):
    def __init__(self, server: FaultyServer) -> None:
        self.server = server

    def put(self, path: str, data: bytes) -> None:
        self.server.files[path] = data

    def get(self, path: str) -> bytes:
        return self.server.files[path]

    def delete(self, path: str) -> None:
        del self.server.files[path]

    def uri(self, path: str) -> str:
        return f"{self.server.url}/{quote(path)}"


class TestServerThatIgnoresIfMatch(OriginContract):
    """Every answer is compared with the pin, whatever the server makes of If-Match."""

    writable = False

    @pytest.fixture
    def raw(self) -> Iterator[RawOrigin]:
        with FaultyServer(honours_if_match=False) as server:
            yield MemoryRaw(server)


def ask(uri: str, body: Callable[[Origin], Awaitable[T]], options: OriginOptions | None = None) -> T:
    async def main() -> T:
        origin = open_origin(reference.parse(uri), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


async def first(origin: Origin) -> bytes:
    return await read(origin, (await origin.list()).files[0])


def test_a_page_in_place_of_a_model_is_not_taken_for_it() -> None:
    with FaultyServer({"llama/login.html": b"<html>please log in</html>"}) as server:
        assert ask(server.url + "/llama", lambda o: o.stat("")) is None
        listing = ask(server.url + "/llama", lambda o: o.list())
        assert [f.path for f in listing.files] == ["login.html"]


def test_without_an_etag_the_time_and_size_are_the_pin() -> None:
    with FaultyServer(
        {"m/a.bin": payload(999)}, faults=[Fault("no_etag", methods=("GET", "HEAD"))]
    ) as server:
        assert ask(server.url + "/m/a.bin", first) == payload(999)
        assert ask(server.url + "/m/a.bin", lambda o: o.list()).files[0].pin.kind == "mtime"


def test_without_an_etag_a_file_of_another_size_is_noticed() -> None:
    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        server.files["m/a.bin"] = payload(1001)
        return await read(origin, file, 0, 500)

    with (
        FaultyServer({"m/a.bin": payload(999)}, faults=[Fault("no_etag", methods=("GET", "HEAD"))]) as server,
        pytest.raises(OriginChanged, match="run this again"),
    ):
        ask(server.url + "/m/a.bin", body)


def test_a_directory_without_files_is_not_found() -> None:
    with FaultyServer({"m/a.bin": b"x"}) as server, pytest.raises(NotFound, match="does not list"):
        ask(server.url + "/other", lambda o: o.list())


@pytest.mark.parametrize("query", ["?X-Signature=s3cret", "?a"])
def test_a_url_with_a_query_is_refused_without_repeating_it(query: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_origin(reference.parse("https://host/model.safetensors" + query))
    assert "s3cret" not in str(caught.value)


def test_a_password_in_a_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(UsageError) as caught:
        open_origin(reference.parse("https://user:s3cret@host/model"))
    assert "s3cret" not in str(caught.value)


def test_headers_are_sent_and_not_shown() -> None:
    options = OriginOptions(headers=(("authorization", "Bearer s3cret"),))
    denied = Fault("status", status=401, methods=("GET", "HEAD"))
    with FaultyServer({"m/a.bin": b"x"}) as server:
        assert ask(server.url + "/m/a.bin", first, options) == b"x"
        assert {r.headers.get("authorization") for r in server.log} == {"Bearer s3cret"}
        server.faults = [denied]
        with pytest.raises(AccessDenied) as caught:
            ask(server.url + "/m/a.bin", first, options)
    assert "s3cret" not in repr(caught.value) + repr(options)


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str]]:
    """(a private CA's certificate, (certificate, key) of a server on 127.0.0.1 that it signed)."""
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)

    def certificate(
        subject: str,
        issuer: str,
        key: ec.EllipticCurvePrivateKey,
        signer: ec.EllipticCurvePrivateKey,
        ca: bool,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(certificate("test CA", "test CA", ca_key, ca_key, True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(certificate("server", "test CA", key, ca_key, False).public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "ca.pem", (str(folder / "cert.pem"), str(folder / "key.pem"))


def test_a_private_ca_is_trusted_when_it_is_named(authority: tuple[Path, tuple[str, str]]) -> None:
    ca, pair = authority
    with FaultyServer({"m/a.bin": payload(5000)}, tls=pair) as server:
        assert ask(server.url + "/m/a.bin", first, OriginOptions(ca_bundle=str(ca))) == payload(5000)


def test_an_unknown_ca_is_refused_with_what_to_do(authority: tuple[Path, tuple[str, str]]) -> None:
    _, pair = authority
    with (
        FaultyServer({"m/a.bin": b"x"}, tls=pair) as server,
        pytest.raises(OriginMisconfigured, match="SSL_CERT_FILE"),
    ):
        ask(server.url + "/m/a.bin", first, OriginOptions())


def test_a_certificate_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing-here"):
        open_origin(
            reference.parse("https://127.0.0.1/m"), OriginOptions(ca_bundle=str(tmp_path / "nothing-here"))
        )


def test_requests_go_through_the_proxy() -> None:
    """The proxy sees the whole URL of a server that this machine could not even name."""
    with FaultyServer({"m/a.bin": payload(5000)}) as proxy:
        options = OriginOptions(proxy=proxy.url)
        assert ask("http://models.invalid/m/a.bin", first, options) == payload(5000)
        assert {r.headers["host"] for r in proxy.log} == {"models.invalid"}
