"""Filesystems that fsspec knows as origins: memory://, archives, and what their `info` tells."""

from __future__ import annotations

import asyncio
import itertools
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec
import pytest
from support.origin_contract import OriginContract, RawOrigin, payload, read

from headrace.cache import reference
from headrace.cache.errors import NotFound, OriginChanged, OriginError, UsageError
from headrace.cache.origins import open_origin
from headrace.cache.origins.fsspec import FsspecOrigin
from headrace.cache.origins.protocol import Listing, Origin, Pin

T = TypeVar("T")
_containers = itertools.count()


class RawMemory(RawOrigin):
    """fsspec's memory filesystem keeps its files for the whole process: each test has its container."""

    def __init__(self) -> None:
        self._filesystem = fsspec.filesystem("memory")
        self._container = f"test-{next(_containers)}"

    def put(self, path: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"/{self._container}/{path}", data)

    def get(self, path: str) -> bytes:
        data: bytes = self._filesystem.cat_file(f"/{self._container}/{path}")
        return data

    def delete(self, path: str) -> None:
        self._filesystem.rm_file(f"/{self._container}/{path}")

    def uri(self, path: str) -> str:
        return f"memory://{self._container}/{path}"

    def clear(self) -> None:
        self._filesystem.rm(f"/{self._container}", recursive=True)


@pytest.fixture
def memory() -> Iterator[RawMemory]:
    raw = RawMemory()
    raw.put("kept", b"")
    yield raw
    raw.clear()


class TestMemory(OriginContract):
    @pytest.fixture
    def raw(self, memory: RawMemory) -> RawOrigin:
        return memory


def run(uri: str, body: Callable[[Origin], Awaitable[T]]) -> T:
    async def main() -> T:
        origin = open_origin(reference.parse(uri))
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


async def everything(origin: Origin) -> dict[str, bytes]:
    return {f.path: await read(origin, f) for f in (await origin.list()).files}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "models.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("llama/config.json", b"{}")
        writer.writestr("llama/sub/model.safetensors", payload(100_000))
        writer.writestr("llama-2/config.json", b"[]")
    return path


def test_a_chained_url_reads_a_directory_of_a_local_archive(archive: Path) -> None:
    assert run(f"zip://llama::file://{archive}", everything) == {
        "config.json": b"{}",
        "sub/model.safetensors": payload(100_000),
    }


def test_a_whole_archive_is_a_directory(archive: Path) -> None:
    found = run(f"zip://::file://{archive}", everything)
    assert sorted(found) == ["llama-2/config.json", "llama/config.json", "llama/sub/model.safetensors"]


def test_ranges_of_an_archived_file_are_read(archive: Path) -> None:
    async def body(origin: Origin) -> bytes:
        file = await origin.stat("sub/model.safetensors")
        assert file is not None
        return await read(origin, file, 50_000, 60_000)

    assert run(f"zip://llama::file://{archive}", body) == payload(100_000)[50_000:60_000]


def test_an_archive_cannot_be_published_to(archive: Path) -> None:
    with pytest.raises(UsageError, match="published"):
        run(f"zip://llama::file://{archive}", lambda origin: origin.put_bytes("a", b"x"))


def test_a_missing_archive_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        run(f"zip://llama::file://{tmp_path}/none.zip", everything)


def test_what_is_no_archive_ends_in_one_of_our_errors(tmp_path: Path) -> None:
    (tmp_path / "models.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(OriginError, match=r"models\.zip"):
        run(f"zip://llama::file://{tmp_path}/models.zip", everything)


def test_a_file_is_read_by_its_own_name_without_listing_first(memory: RawMemory) -> None:
    memory.put("llama/model.safetensors", payload(500))

    async def body(origin: Origin) -> bytes:
        file = await origin.stat("model.safetensors")
        assert file is not None
        assert await origin.stat("config.json") is None
        return await read(origin, file, 1, 499)

    assert run(memory.uri("llama/model.safetensors"), body) == payload(500)[1:499]


def test_a_directory_may_hold_a_file_of_its_own_name(memory: RawMemory) -> None:
    memory.put("llama/llama", b"inner")
    assert run(memory.uri("llama"), everything) == {"llama": b"inner"}


class ToldFilesystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """One file whose `info` is data: what object stores of all kinds tell about theirs."""

    protocol = "told"
    cachable = False

    def __init__(self, **told: object) -> None:
        super().__init__()
        self.told = told

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": 4, "type": "file", **self.told}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        return b"data"[start:end]


def described(**told: object) -> Listing:
    async def main() -> Listing:
        origin = FsspecOrigin("told://b/a.bin", ToldFilesystem(**told), "b/a.bin")
        try:
            return await origin.list()
        finally:
            await origin.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("told", "pin"),
    [
        ({"VersionId": "v7", "ETag": '"abc"', "LastModified": "monday"}, Pin("version", "v7")),
        ({"VersionId": None, "ETag": '"abc"', "LastModified": "monday"}, Pin("etag", "abc")),
        ({"VersionId": "null", "etag": "abc"}, Pin("etag", "abc")),
        ({"generation": 17, "etag": "abc"}, Pin("generation", "17")),
        ({"mtime": 12.5}, Pin("mtime", "12.5-4")),
        ({}, Pin("size", "4")),
    ],
)
def test_the_strongest_version_that_is_told_is_the_pin(told: dict[str, object], pin: Pin) -> None:
    assert described(**told).files[0].pin == pin


def test_a_version_that_changes_during_a_read_is_noticed_before_its_end() -> None:
    async def main() -> bytes:
        filesystem = ToldFilesystem(ETag="one")
        origin = FsspecOrigin("told://b/a.bin", filesystem, "b/a.bin")
        try:
            file = (await origin.list()).files[0]
            assert await read(origin, file) == b"data"
            filesystem.told = {"ETag": "two"}
            return await read(origin, file)
        finally:
            await origin.close()

    with pytest.raises(OriginChanged, match=r"a\.bin"):
        asyncio.run(main())
