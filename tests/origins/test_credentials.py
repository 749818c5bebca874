"""Credentials: found where each cloud's tools find them, renewed without a restart, shown nowhere."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.faulty_server import Fault, FaultyServer
from support.origin_contract import payload, read

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, MissingDependency, UsageError
from headrace.cache.origins import RetryingOrigin, credentials, open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import OriginFile

pytestmark = pytest.mark.usefixtures("both_ways")

T = TypeVar("T")
DATA = payload(100_000)
SECRET = "s3cret-that-must-not-leak"
TOKEN = "t0ken-that-must-not-leak"
REFUSE_OLD = Fault(
    "status", status=403, methods=("GET", "HEAD"), header=("authorization", "*Credential=OLD*")
)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer({"bucket/a.bin": DATA}) as server:
        yield server


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the AWS credentials file, as a tool that rotates keys does."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(key: str) -> None:
        file.write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {SECRET}\naws_session_token = {TOKEN}\n"
        )

    return write


def ask(
    server: FaultyServer,
    body: Callable[[RetryingOrigin], Awaitable[T]],
    options: OriginOptions | None = None,
) -> T:
    options = dataclasses.replace(
        options or OriginOptions.from_env("s3"), endpoint=server.url, region="us-east-1", attempts=1
    )

    async def main() -> T:
        origin = open_origin(reference.parse("s3://bucket"), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


async def pinned(origin: RetryingOrigin) -> OriginFile:
    file = await origin.stat("a.bin")
    assert file is not None
    return file


def used(server: FaultyServer) -> list[str]:
    """The access keys of the requests that were answered with data, in order."""
    sent = [r.headers["authorization"] for r in server.requests() if r.status == 206]
    return [text.partition("Credential=")[2].partition("/")[0] for text in sent]


# -- renewal -----------------------------------------------------------------------------------


def test_keys_that_are_rotated_midway_are_taken_up(server: FaultyServer, keys: Callable[[str], None]) -> None:
    keys("OLD")

    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        before = await read(origin, file, 0, 50_000)
        keys("NEW")
        server.faults = [REFUSE_OLD]
        return before + await read(origin, file, 50_000, 100_000)

    assert ask(server, body) == DATA
    assert used(server) == ["OLD", "NEW"]


def test_many_reads_that_are_refused_at_once_all_go_on(
    server: FaultyServer, keys: Callable[[str], None]
) -> None:
    keys("OLD")

    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        keys("NEW")
        server.faults = [REFUSE_OLD]
        parts = [read(origin, file, start, start + 10_000) for start in range(0, 100_000, 10_000)]
        return b"".join(await asyncio.gather(*parts))

    assert ask(server, body) == DATA
    assert set(used(server)) == {"NEW"}


def test_a_credential_process_is_asked_again_when_its_answer_is_refused(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary credentials that end before their time: the profile's program gives new ones."""
    calls, script, config = tmp_path / "calls", tmp_path / "process.py", tmp_path / "config"
    answer = {"Version": 1, "SecretAccessKey": SECRET, "SessionToken": TOKEN}
    script.write_text(
        "import json, pathlib\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "count = len(calls.read_text()) if calls.exists() else 0\n"
        "calls.write_text('x' * (count + 1))\n"
        f"answer = {answer!r}\n"
        "answer |= {'AccessKeyId': 'OLD' if count == 0 else 'NEW', 'Expiration': '2099-01-01T00:00:00Z'}\n"
        "print(json.dumps(answer))\n"
    )
    config.write_text(f"[profile models]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "models")

    async def body(origin: RetryingOrigin) -> bytes:
        file = await pinned(origin)
        before = await read(origin, file, 0, 50_000)
        server.faults = [REFUSE_OLD]
        return before + await read(origin, file, 50_000, 100_000)

    assert ask(server, body) == DATA
    assert used(server) == ["OLD", "NEW"]
    assert calls.read_text() == "xx"


def test_what_stays_refused_is_denied_after_one_renewal(
    server: FaultyServer, keys: Callable[[str], None]
) -> None:
    keys("OLD")

    async def body(origin: RetryingOrigin) -> None:
        file = await pinned(origin)
        server.faults = [REFUSE_OLD]
        for _ in range(3):
            with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
                await read(origin, file)

    ask(server, body)
    assert len(server.requests()) == 4  # three reads, and one more with what was thought to be new


# -- secrets -----------------------------------------------------------------------------------


def test_no_secret_is_in_an_error_a_repr_or_the_log(
    server: FaultyServer,
    keys: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    keys("OLD")
    proxy = f"http://user:{SECRET}@127.0.0.1:9"
    options = OriginOptions(proxy=proxy, headers=(("x-auth", SECRET),))
    texts = [repr(options), repr(credentials.aws(OriginOptions()))]
    server.faults = [REFUSE_OLD]

    async def body(origin: RetryingOrigin) -> None:
        texts.append(repr(origin) + repr(origin.adapter))
        with pytest.raises(AccessDenied) as caught:
            await origin.stat("a.bin")
        error: BaseException | None = caught.value
        while error is not None:
            texts.append(repr(error))
            error = error.__cause__

    ask(server, body)
    everything = "\n".join([*texts, caplog.text])
    assert SECRET not in everything
    assert TOKEN not in everything


# -- who is asked ------------------------------------------------------------------------------


def test_anonymous_requests_carry_no_signature(server: FaultyServer, keys: Callable[[str], None]) -> None:
    keys("OLD")
    ask(server, pinned, OriginOptions(anonymous=True))
    assert ["authorization" in r.headers for r in server.log] == [False]


def test_requester_pays_is_said_in_every_request(server: FaultyServer, keys: Callable[[str], None]) -> None:
    keys("OLD")

    async def body(origin: RetryingOrigin) -> bytes:
        return await read(origin, await pinned(origin))

    ask(server, body, OriginOptions(requester_pays=True))
    assert [r.headers.get("x-amz-request-payer") for r in server.log] == ["requester", "requester"]


def test_keys_in_the_environment_come_before_the_files(
    server: FaultyServer, keys: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys("OLD")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ask(server, pinned)
    assert "Credential=ENVIRONMENT/" in server.log[0].headers["authorization"]


def test_keys_in_the_environment_come_before_a_profile_that_is_named_there(
    server: FaultyServer, keys: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys("OLD")
    monkeypatch.setenv("AWS_PROFILE", "default")
    ask(server, pinned)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ask(server, pinned)
    signers = [r.headers["authorization"].partition("Credential=")[2].partition("/")[0] for r in server.log]
    assert signers == ["OLD", "ENVIRONMENT"]


def test_the_region_of_the_profile_is_used(
    server: FaultyServer, keys: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys("OLD")
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    async def main() -> None:
        origin = open_origin(reference.parse("s3://bucket"), OriginOptions(endpoint=server.url))
        await pinned(origin)
        await origin.close()

    asyncio.run(main())
    assert "/eu-north-1/s3/" in server.log[0].headers["authorization"]


def test_no_credentials_anywhere_says_where_to_put_them(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer() as metadata:  # an instance without a role
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata.url)
        with pytest.raises(
            AccessDenied, match=r"no credentials were found for s3://bucket/a\.bin.*anonymous"
        ):
            ask(server, pinned)


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(UsageError, match="'nobody'"):
        open_origin(reference.parse("s3://bucket"), OriginOptions(profile="nobody"))


def test_a_profile_without_botocore_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)  # what an import finds where it is not installed
    with pytest.raises(MissingDependency, match=r"headrace\[s3\]"):
        credentials.aws(OriginOptions(profile="models"), {})


def test_google_federation_needs_google_auth_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "adc.json"
    file.write_text(json.dumps({"type": "external_account"}))
    monkeypatch.setitem(sys.modules, "google", None)
    with pytest.raises(MissingDependency, match=r"headrace\[gcs\]"):
        credentials.google(OriginOptions(), {"GOOGLE_APPLICATION_CREDENTIALS": str(file)})


def test_google_service_accounts_are_left_to_obstore(tmp_path: Path) -> None:
    file = tmp_path / "adc.json"
    file.write_text(json.dumps({"type": "service_account", "private_key": SECRET}))
    assert credentials.google(OriginOptions(), {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}) is None


def test_broken_google_credentials_are_named_without_their_content(tmp_path: Path) -> None:
    file = tmp_path / "adc.json"
    file.write_text(SECRET)
    with pytest.raises(UsageError, match=r"adc\.json") as caught:
        credentials.google(OriginOptions(), {"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    assert SECRET not in str(caught.value)


def test_azure_accounts_are_found_in_a_connection_string_and_in_a_uri() -> None:
    text = f"DefaultEndpointsProtocol=http;AccountName=acc;AccountKey={SECRET}==;BlobEndpoint=http://h:1/acc;"
    container, config = credentials.azure("models", {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert container == "models"
    assert config == {"account_name": "acc", "account_key": f"{SECRET}==", "endpoint": "http://h:1/acc"}
    container, config = credentials.azure("models@other.dfs.core.windows.net", {})
    assert (container, config) == ("models", {"account_name": "other"})
