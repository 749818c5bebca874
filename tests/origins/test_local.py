"""Directories of this machine as an origin, Hugging Face caches included."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from support.origin_contract import OriginContract, RawOrigin, payload, read

from headrace.cache import reference
from headrace.cache.errors import NotFound, OriginChanged, UnsafePath, UsageError
from headrace.cache.origins import open_origin
from headrace.cache.origins.protocol import Listing, Origin

T = TypeVar("T")


class RawDirectory(RawOrigin):
    def __init__(self, top: Path, scheme: str) -> None:
        self._top = top
        self._scheme = scheme

    def put(self, path: str, data: bytes) -> None:
        target = self._top / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new inode each time: the clock of modification times may tick too slowly for a test.
        fresh = self._top.with_name("fresh")
        fresh.write_bytes(data)
        fresh.replace(target)

    def get(self, path: str) -> bytes:
        return (self._top / path).read_bytes()

    def delete(self, path: str) -> None:
        (self._top / path).unlink()

    def uri(self, path: str) -> str:
        return f"{self._scheme}{self._top / path}"


class TestBarePath(OriginContract):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawOrigin:
        return RawDirectory(tmp_path / "top", "")


class TestFileUri(OriginContract):
    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawOrigin:
        return RawDirectory(tmp_path / "top", "file://")


def run(path: Path, body: Callable[[Origin], Awaitable[T]]) -> T:
    async def main() -> T:
        origin = open_origin(reference.parse(str(path)))
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


def listed(path: Path) -> Listing:
    return run(path, lambda origin: origin.list())


def test_a_file_replaced_by_rename_at_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    target, other = tmp_path / "a.bin", tmp_path / "other"
    target.write_bytes(payload(100, 1))
    other.write_bytes(payload(100, 2))
    times = target.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))

    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        other.replace(target)
        return await read(origin, file)

    with pytest.raises(OriginChanged, match=r"a\.bin"):
        run(tmp_path, body)


def test_a_file_rewritten_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(payload(16 << 20, 1))
    os.utime(target, (1_700_000_000, 1_700_000_000))

    async def body(origin: Origin) -> None:
        file = (await origin.list()).files[0]
        async for _ in origin.read(file, 0, file.size):
            with target.open("r+b") as writer:
                writer.write(b"changed")

    with pytest.raises(OriginChanged):
        run(tmp_path, body)


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "one.bin").write_bytes(b"12345")
    (tmp_path / "model.bin").symlink_to("shards/one.bin")
    assert [(f.path, f.size) for f in listed(tmp_path).files] == [("model.bin", 5), ("shards/one.bin", 5)]


def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"not yours")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePath, match=r"config\.json"):
        listed(model)
    with pytest.raises(UnsafePath):
        run(model, lambda origin: origin.stat("config.json"))


@pytest.mark.parametrize("path", ["../secret", "sub/../../secret", "/etc/hostname"])
def test_paths_that_leave_the_directory_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"not yours")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_bytes(b"x")
    with pytest.raises(UnsafePath):
        run(tmp_path / "model", lambda origin: origin.fetch(path, 100))
    with pytest.raises(UnsafePath):
        run(tmp_path / "model", lambda origin: origin.put_bytes(path, b"y"))
    assert (tmp_path / "secret").read_bytes() == b"not yours"


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("blobs-that-never-came")
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        listed(tmp_path)


def test_a_link_to_a_directory_is_refused_so_that_loops_end(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "again").symlink_to(".")
    with pytest.raises(UnsafePath, match="again"):
        listed(tmp_path)


def test_a_pipe_is_refused_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafePath, match="pipe"):
        listed(tmp_path)


def test_a_missing_or_empty_directory_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(NotFound, match=path.name):
            listed(path)


def test_publishing_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"model\.bin"):
        run(tmp_path / "model.bin", lambda origin: origin.put_bytes("a", b"y"))


def test_an_upload_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.bin").write_bytes(b"old")
    with pytest.raises(UsageError, match="no such source"):
        run(model, lambda origin: origin.put("a.bin", str(tmp_path / "no such source")))
    assert [(p.name, p.read_bytes()) for p in model.iterdir()] == [("a.bin", b"old")]


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A model's folder as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / "models--org--name"
    weights, config = payload(5000), b"{}"
    digest = hashlib.sha256(weights).hexdigest()
    for name, data in ((digest, weights), ("44136fa355b3678a1146ad16f7e8649e94fb4f21", config)):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / name).write_bytes(data)
    snapshot = folder / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    (snapshot / "config.json").symlink_to("../../blobs/44136fa355b3678a1146ad16f7e8649e94fb4f21")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    return folder


@pytest.mark.parametrize("below", ["", "snapshots/c0ffee"])
def test_a_hugging_face_cache_is_read_through_its_links_and_gives_digests(
    hub_cache: Path, below: str
) -> None:
    async def body(origin: Origin) -> dict[str, tuple[str | None, bytes]]:
        files = (await origin.list()).files
        return {f.path: (f.digest, await read(origin, f)) for f in files}

    weights = payload(5000)
    assert run(hub_cache / below, body) == {
        "config.json": (None, b"{}"),
        "model.safetensors": (f"sha256:{hashlib.sha256(weights).hexdigest()}", weights),
    }


def test_one_file_of_a_hugging_face_cache_is_read_by_its_name(hub_cache: Path) -> None:
    listing = listed(hub_cache / "snapshots" / "c0ffee" / "model.safetensors")
    assert listing.single
    assert [f.path for f in listing.files] == ["model.safetensors"]
    assert listing.files[0].digest is not None


def test_links_out_of_a_hugging_face_cache_are_refused(hub_cache: Path) -> None:
    (hub_cache.parent / "secret").write_bytes(b"not yours")
    (hub_cache / "snapshots" / "c0ffee" / "extra").symlink_to("../../../secret")
    with pytest.raises(UnsafePath, match="extra"):
        listed(hub_cache)


def test_a_hugging_face_cache_without_a_current_snapshot_says_which_there_are(hub_cache: Path) -> None:
    (hub_cache / "refs" / "main").unlink()
    (hub_cache / "snapshots" / "beef").mkdir()
    with pytest.raises(UsageError, match="beef, c0ffee"):
        listed(hub_cache)
