"""Google Cloud Storage through obstore, against a fake of its XML API."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from support.fake_gcs import FakeGcs
from support.origin_contract import OriginContract, RawOrigin

from headrace.cache import reference
from headrace.cache.errors import AccessDenied
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, Pin


class RawGcs(RawOrigin):
    def __init__(self, fake: FakeGcs) -> None:
        self._fake = fake

    def put(self, path: str, data: bytes) -> None:
        self._fake.put(f"bucket/{path}", data)

    def get(self, path: str) -> bytes:
        return self._fake.objects[f"bucket/{path}"].data

    def delete(self, path: str) -> None:
        del self._fake.objects[f"bucket/{path}"]

    def uri(self, path: str) -> str:
        return f"gs://bucket/{path}"


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def gcs(key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGcs]:
    account = {
        "type": "service_account",
        "client_email": "tests@project.iam.gserviceaccount.com",
        "private_key_id": "1",
        "private_key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    }
    file = tmp_path / "account.json"
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with FakeGcs() as fake:
        fake.keys = [key.public_key()]
        monkeypatch.setenv("GOOGLE_BASE_URL", fake.url)
        yield fake


class TestGcs(OriginContract):
    @pytest.fixture
    def raw(self, gcs: FakeGcs) -> RawOrigin:
        return RawGcs(gcs)


def listed(**changes: Any) -> Listing:
    async def main() -> Listing:
        options = dataclasses.replace(OriginOptions.from_env("gs"), **changes)
        origin = open_origin(reference.parse("gs://bucket/llama"), options)
        try:
            return await origin.list()
        finally:
            await origin.close()

    return asyncio.run(main())


def test_files_are_pinned_to_their_generation(gcs: FakeGcs) -> None:
    stored = gcs.put("bucket/llama/a.bin", b"data")
    assert listed().files[0].pin == Pin("generation", str(stored.generation))


def test_an_account_that_is_refused_is_named_and_its_key_never_shown(gcs: FakeGcs) -> None:
    gcs.put("bucket/llama/a.bin", b"data")
    gcs.keys = [rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()]
    with pytest.raises(AccessDenied, match="GOOGLE_APPLICATION_CREDENTIALS") as caught:
        listed()
    assert "PRIVATE KEY" not in repr(caught.value)
    assert "eyJ" not in repr(caught.value)  # how every JWT begins


def test_a_public_bucket_is_read_without_credentials(gcs: FakeGcs) -> None:
    gcs.keys = []
    gcs.put("bucket/llama/a.bin", b"data")
    assert [f.path for f in listed(anonymous=True).files] == ["a.bin"]
    assert all("authorization" not in r.headers for r in gcs.requests)
