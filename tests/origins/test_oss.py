"""Alibaba OSS, against a fake that answers what oss2 asks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.fake_oss import FakeOss
from support.origin_contract import OriginContract, RawOrigin, payload, read

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, OriginMisconfigured, OriginUnavailable, UsageError
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin

T = TypeVar("T")


class RawOss(RawOrigin):
    def __init__(self, fake: FakeOss) -> None:
        self._fake = fake

    def put(self, path: str, data: bytes) -> None:
        self._fake.put(f"bucket/{path}", data)

    def get(self, path: str) -> bytes:
        return self._fake.objects[f"bucket/{path}"].data

    def delete(self, path: str) -> None:
        del self._fake.objects[f"bucket/{path}"]

    def uri(self, path: str) -> str:
        return f"oss://bucket/{path}"


@pytest.fixture
def oss(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOss]:
    for prefix in ("OSS", "ALIBABA_CLOUD"):
        for name in ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET", "SECURITY_TOKEN"):
            monkeypatch.delenv(f"{prefix}_{name}", raising=False)
    monkeypatch.delenv("OSS_REGION", raising=False)
    with FakeOss() as fake:
        fake.accepted = {("key", None)}
        monkeypatch.setenv("OSS_ENDPOINT", fake.url)
        monkeypatch.setenv("OSS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "very-secret")
        yield fake


class TestOss(OriginContract):
    large = 40 << 20  # two parts

    @pytest.fixture
    def raw(self, oss: FakeOss) -> RawOrigin:
        return RawOss(oss)


class TestOssSignedV4(OriginContract):
    large = 1 << 20

    @pytest.fixture
    def raw(self, oss: FakeOss, monkeypatch: pytest.MonkeyPatch) -> RawOrigin:
        monkeypatch.setenv("OSS_REGION", "cn-hangzhou")
        return RawOss(oss)


def run(uri: str, body: Callable[[Origin], Awaitable[T]], **changes: object) -> T:
    async def main() -> T:
        options = dataclasses.replace(OriginOptions.from_env("oss"), **changes)  # type: ignore[arg-type]
        origin = open_origin(reference.parse(uri), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


def test_credentials_renewed_midway_are_used_without_a_restart(
    oss: FakeOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = payload(2000)
    oss.put("bucket/llama/a.bin", data)
    monkeypatch.setenv("OSS_SECURITY_TOKEN", "first")
    oss.accepted = {("key", "first")}

    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        begun = await read(origin, file, 0, 1000)
        oss.accepted = {("key", "second")}
        with pytest.raises(AccessDenied, match="expired"):
            await read(origin, file, 1000, 2000)
        monkeypatch.setenv("OSS_SECURITY_TOKEN", "second")
        return begun + await read(origin, file, 1000, 2000)

    assert run("oss://bucket/llama", body) == data


def test_refused_credentials_are_named_and_never_shown(oss: FakeOss) -> None:
    oss.accepted = {("another", None)}
    with pytest.raises(AccessDenied, match="OSS_ACCESS_KEY_ID") as caught:
        run("oss://bucket/llama", lambda origin: origin.list())
    assert "very-secret" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_missing_credentials_say_what_to_set(oss: FakeOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ACCESS_KEY_ID")
    with pytest.raises(AccessDenied, match="OSS_ACCESS_KEY_ID"):
        run("oss://bucket/llama", lambda origin: origin.list())
    assert oss.requests == []


def test_a_public_bucket_is_read_without_credentials(oss: FakeOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ACCESS_KEY_ID")
    oss.accepted = {("", None)}
    oss.put("bucket/llama/a.bin", b"public")

    async def body(origin: Origin) -> bytes:
        return await read(origin, (await origin.list()).files[0])

    assert run("oss://bucket/llama", body, anonymous=True) == b"public"


def test_the_request_payer_is_sent_with_every_request(oss: FakeOss) -> None:
    oss.put("bucket/llama/a.bin", b"data")

    async def body(origin: Origin) -> bytes:
        return await read(origin, (await origin.list()).files[0])

    run("oss://bucket/llama", body, requester_pays=True)
    assert [r.headers.get("x-oss-request-payer") for r in oss.requests] == ["requester"] * len(oss.requests)


def test_exactly_the_bytes_asked_for_are_requested(oss: FakeOss) -> None:
    oss.put("bucket/llama/a.bin", payload(5000))

    async def body(origin: Origin) -> bytes:
        return await read(origin, (await origin.list()).files[0], 1000, 2000)

    run("oss://bucket/llama", body)
    reads = [r for r in oss.requests if r.method == "GET" and "range" in r.headers]
    assert [(r.headers["range"], "if-match" in r.headers) for r in reads] == [("bytes=1000-1999", True)]


def test_directory_markers_are_not_files(oss: FakeOss) -> None:
    for key in ("llama/", "llama/sub/", "llama/sub/a.bin"):
        oss.put(f"bucket/{key}", b"x" if key.endswith("bin") else b"")
    listing = run("oss://bucket/llama", lambda origin: origin.list())
    assert [f.path for f in listing.files] == ["sub/a.bin"]


def test_a_whole_bucket_is_listed(oss: FakeOss) -> None:
    for number in range(8):
        oss.put(f"bucket/{number}.bin", b"x")
    listing = run("oss://bucket", lambda origin: origin.list())
    assert len(listing.files) == 8


def test_one_object_is_read_without_listing_first(oss: FakeOss) -> None:
    oss.put("bucket/llama/a.bin", payload(100))

    async def body(origin: Origin) -> bytes:
        file = await origin.stat("a.bin")
        assert file is not None
        assert await origin.fetch("manifest.json", 100) is None
        return await read(origin, file)

    assert run("oss://bucket/llama/a.bin", body) == payload(100)


def test_no_endpoint_says_what_to_set(oss: FakeOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ENDPOINT")
    with pytest.raises(OriginMisconfigured, match="OSS_ENDPOINT"):
        run("oss://bucket/llama", lambda origin: origin.list())


def test_an_endpoint_that_nobody_serves_is_unavailable(oss: FakeOss, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = FakeOss()
    with gone:
        url = gone.url
    monkeypatch.setenv("OSS_ENDPOINT", url)
    with pytest.raises(OriginUnavailable, match="oss://bucket/llama"):
        run("oss://bucket/llama", lambda origin: origin.list(), attempts=2, backoff_base=0.0)


def test_a_missing_source_is_an_error_and_uploads_nothing(oss: FakeOss, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none"):
        run("oss://bucket/llama", lambda origin: origin.put("a.bin", str(tmp_path / "none")))
    assert oss.objects == {}
