"""The contract on a real S3 server, and what only S3 has: versions, markers, pages, refusals."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from support.origin_contract import OriginContract, RawOrigin, payload, read
from support.seaweedfs import SECRET_KEY, SeaweedFS

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, NotFound
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin

pytestmark = pytest.mark.service
T = TypeVar("T")
_numbers = itertools.count()


class S3Raw(RawOrigin):
    """A bucket, through boto3."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.client, self.bucket = client, bucket

    def put(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=path, Body=data)

    def get(self, path: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=path)["Body"].read()
        return data

    def delete(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=path)

    def uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{path}"


@pytest.fixture
def raw(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Raw]:
    for name, value in seaweedfs.environ.items():
        monkeypatch.setenv(name, value)
    client = seaweedfs.client()
    bucket = f"bucket-{next(_numbers)}"
    client.create_bucket(Bucket=bucket)
    yield S3Raw(client, bucket)
    # A bucket takes volumes of its own, of which the server makes only so many.
    versions = client.list_object_versions(Bucket=bucket)
    for version in versions.get("Versions", []) + versions.get("DeleteMarkers", []):
        client.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
    client.delete_bucket(Bucket=bucket)
    client.close()


@pytest.fixture
def versioned(raw: S3Raw) -> S3Raw:
    raw.client.put_bucket_versioning(Bucket=raw.bucket, VersioningConfiguration={"Status": "Enabled"})
    return raw


def ask(uri: str, body: Callable[[Origin], Awaitable[T]], options: OriginOptions | None = None) -> T:
    async def main() -> T:
        origin = open_origin(reference.parse(uri), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


@pytest.mark.usefixtures("both_ways")
class TestSeaweedFS(OriginContract):
    @pytest.fixture
    def raw(self, raw: S3Raw) -> RawOrigin:
        return raw


class TestSeaweedFSWithVersions(OriginContract):
    keeps_versions = True

    @pytest.fixture
    def raw(self, versioned: S3Raw) -> RawOrigin:
        return versioned


def test_pins_are_versions_where_the_bucket_keeps_them(versioned: S3Raw) -> None:
    versioned.put("llama/a.bin", b"a")
    listing = ask("s3://" + versioned.bucket + "/llama", lambda o: o.list())
    assert listing.files[0].pin.kind == "version"


def test_pins_are_etags_otherwise(raw: S3Raw) -> None:
    raw.put("llama/a.bin", b"a")
    listing = ask(raw.uri("llama"), lambda o: o.list())
    assert str(listing.files[0].pin) == "etag:0cc175b9c0f1b6a831c399e269772661"


def test_a_listing_of_several_pages_is_whole(raw: S3Raw) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: raw.put(f"llama/{i:05}", b"x"), range(1100)))
    listing = ask(raw.uri("llama"), lambda o: o.list())
    assert [f.path for f in listing.files] == [f"{i:05}" for i in range(1100)]


def test_directory_markers_are_not_files(raw: S3Raw) -> None:
    raw.put("llama/", b"")
    raw.put("llama/sub/", b"")
    raw.put("llama/sub/a.bin", b"a")
    raw.put("llama/nothing-in-it/", b"")
    raw.put("llama/empty.bin", b"")
    listing = ask(raw.uri("llama"), lambda o: o.list())
    assert [f.path for f in listing.files] == ["empty.bin", "sub/a.bin"]


def test_a_single_object_is_read_by_a_process_that_did_not_list_it(raw: S3Raw) -> None:
    data = payload(3000)
    raw.put("llama/model.safetensors", data)
    uri = raw.uri("llama/model.safetensors")
    file = ask(uri, lambda o: o.list()).files[0]
    assert ask(uri, lambda o: read(o, file, 5, 2000)) == data[5:2000]


def test_a_whole_bucket_is_a_model_too(raw: S3Raw) -> None:
    raw.put("config.json", b"{}")
    raw.put("sub/a.bin", b"a")
    listing = ask(f"s3://{raw.bucket}", lambda o: o.list())
    assert [f.path for f in listing.files] == ["config.json", "sub/a.bin"]


def test_an_unknown_bucket_is_named(raw: S3Raw) -> None:
    with pytest.raises(NotFound, match="no-such-bucket"):
        ask("s3://no-such-bucket/llama", lambda o: o.list())


def test_a_wrong_secret_is_denied_and_never_shown(raw: S3Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.put("llama/a.bin", b"a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-" + SECRET_KEY)
    with pytest.raises(AccessDenied, match=r"SignatureDoesNotMatch.*AWS_ACCESS_KEY_ID") as caught:
        ask(raw.uri("llama"), lambda o: o.list())
    assert SECRET_KEY not in repr(caught.value)
