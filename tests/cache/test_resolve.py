"""What a reference points to: the published manifest if there is one, else the listing and the headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.faulty_server import Fault, FaultyServer
from support.models import (
    CHUNK,
    PATIENT,
    below,
    grid_of,
    manifest_of,
    published,
    small_model,
    stage_small,
    visible,
)

from headrace.cache.errors import (
    AccessDenied,
    CheckpointError,
    HeadraceError,
    ManifestError,
    NotFound,
    OriginChanged,
    OriginUnavailable,
)
from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.origins import open_origin
from headrace.cache.reference import parse
from headrace.cache.resolve import Requirement, Resolution, resolve
from headrace.cache.snapshot import Selection

MODEL = small_model()
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as one:
        yield one


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def write(folder: Path, files: Mapping[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return str(folder)


def resolved(reference: str, wanted: Selection | None = None, **how: Any) -> Resolution:
    async def ask() -> Resolution:
        origin = open_origin(parse(reference), PATIENT)
        try:
            return await resolve(origin, wanted or Selection(), **{"chunk": CHUNK, **how})
        finally:
            await origin.close()

    return asyncio.run(ask())


def refused(reference: str, kind: type[HeadraceError], says: str, **how: Any) -> None:
    with pytest.raises(kind, match=says) as caught:
        resolved(reference, **how)
    assert "\n" not in str(caught.value)


# -- from a listing


def test_a_listing_becomes_a_manifest_with_sizes_pins_and_grids_by_tensors(tmp_path: Path) -> None:
    found = resolved(write(tmp_path / "m", MODEL))
    assert not found.manifest.published
    assert found.manifest.uri == f"file://{tmp_path}/m"
    assert list(found.manifest.by_path) == sorted(MODEL)
    for path, data in MODEL.items():
        file = found.manifest.by_path[path]
        assert (file.size, file.grid) == (len(data), grid_of(path, data))
        assert file.pin is not None
        assert file.digest is None
        assert file.chunks is None


def test_the_headers_that_were_read_are_handed_on(tmp_path: Path) -> None:
    found = resolved(write(tmp_path / "m", MODEL))
    assert set(found.headers) == {path for path in MODEL if path.endswith(".safetensors")}
    for path, head in found.headers.items():
        assert MODEL[path].startswith(head)
        assert len(head) == found.manifest.by_path[path].grid.lengths[0]


def test_a_known_snapshot_saves_reading_headers_and_takes_the_pins_of_now(tmp_path: Path) -> None:
    reference = write(tmp_path / "m", MODEL)
    first = resolved(reference).manifest
    asked = []

    def known(plain: Any) -> Any:
        asked.append(plain)
        return first

    again = resolved(reference, known=known)
    assert again.headers == {}
    assert again.manifest == first
    assert asked[0].snapshot_id("default") == first.snapshot_id("default")


def test_a_single_file_can_be_meant(tmp_path: Path) -> None:
    write(tmp_path / "m", MODEL)
    assert list(resolved(f"{tmp_path}/m/{SHARD}").manifest.by_path) == [SHARD]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
        (MODEL[SHARD][:100], "truncated"),
        (MODEL[SHARD][:-5], "truncated, 5 of"),
        (MODEL[SHARD] + b"more", "after its last tensor"),
        (b"\x80\x04pickle...", "pickle"),
    ],
)
def test_what_is_called_safetensors_and_is_not_is_refused_by_name(
    tmp_path: Path, root: Path, data: bytes, says: str
) -> None:
    reference = write(tmp_path / "m", {**MODEL, SHARD: data})
    refused(reference, CheckpointError, f"{SHARD}.*{says}")
    with pytest.raises(CheckpointError):
        stage_small(reference, root)
    assert visible(root) == {}


def test_an_empty_or_missing_place_is_refused(tmp_path: Path, server: FaultyServer) -> None:
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), NotFound, "does not exist or holds no file")
    refused(str(tmp_path / "missing"), NotFound, "does not exist or holds no file")
    refused(f"{server.url}/missing", NotFound, "missing")


# -- from a published manifest


def test_a_published_manifest_is_believed_and_pinned(tmp_path: Path) -> None:
    found = resolved(write(tmp_path / "m", published(MODEL, chunk=2 * CHUNK)))
    truth = manifest_of(MODEL, chunk=2 * CHUNK)
    assert found.manifest.published
    assert found.manifest.canonical() == truth.canonical()
    assert found.headers == {}
    assert all(f.pin is not None for f in found.manifest.files)


def test_files_that_the_manifest_does_not_name_are_no_part_of_the_model(tmp_path: Path) -> None:
    found = resolved(
        write(tmp_path / "m", {**published(MODEL), "stray.json": b"{}", "x.safetensors": b"junk"})
    )
    assert set(found.manifest.by_path) == set(MODEL)


def test_patterns_choose_from_a_published_manifest_which_then_keeps_no_signature(tmp_path: Path) -> None:
    files = {**MODEL, "pytorch_model.bin": b"pickle"}
    found = resolved(write(tmp_path / "m", published(files)))
    assert set(found.manifest.by_path) == set(MODEL)
    assert [s.path for s in found.skipped] == ["pytorch_model.bin"]
    only = resolved(str(tmp_path / "m"), Selection(("*.json",))).manifest
    assert list(only.by_path) == ["config.json"]
    assert only.signatures == ()


def test_a_file_of_the_manifest_that_is_gone_or_of_another_size_is_refused(tmp_path: Path) -> None:
    reference = write(tmp_path / "m", published(MODEL))
    (tmp_path / "m" / SHARD).write_bytes(MODEL[SHARD][:-1])
    refused(reference, OriginChanged, f"{SHARD} has {len(MODEL[SHARD]) - 1} bytes, its manifest says")
    (tmp_path / "m" / SHARD).unlink()
    refused(reference, NotFound, f"names '{SHARD}', which is not there")


def test_a_manifest_where_nothing_can_be_listed_is_enough(server: FaultyServer) -> None:
    server.index = False
    server.files = below("m", published(MODEL))
    found = resolved(f"{server.url}/m")
    assert set(found.manifest.by_path) == set(MODEL)
    assert all(f.pin is not None for f in found.manifest.files)
    del server.files[f"m/{SHARD}"]
    refused(f"{server.url}/m", NotFound, SHARD)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"headrace": 2}, "format 2.*upgrade headrace"),
        ({"manifest": None}, "not a headrace manifest"),
        ({"manifest": {"algorithm": "md5", "files": []}}, "'md5'"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_and_not_passed_over(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    content = json.loads(manifest_of(MODEL).to_published())
    reference = write(tmp_path / "m", {**MODEL, PUBLISHED_NAME: json.dumps(content | change).encode()})
    refused(reference, ManifestError, says)


def test_a_manifest_cannot_say_where_the_bytes_come_from(tmp_path: Path) -> None:
    """The source part belongs to the store's own manifests."""
    other = replace(manifest_of(MODEL), uri="file:///somewhere/else", published=False)
    found = resolved(write(tmp_path / "m", {**MODEL, PUBLISHED_NAME: other.to_stored()}))
    assert found.manifest.uri == f"file://{tmp_path}/m"
    assert found.manifest.published


def test_what_is_required_has_to_be_there(tmp_path: Path) -> None:
    reference = write(tmp_path / "m", MODEL)
    refused(reference, ManifestError, "requires a published manifest", requirement=Requirement("published"))
    write(tmp_path / "m", published(MODEL))
    assert resolved(reference, requirement=Requirement("published")).manifest.published


# -- what is remembered


def test_a_resolution_is_believed_for_as_long_as_asked(server: FaultyServer, root: Path) -> None:
    server.files = below("m", MODEL)
    first = stage_small(f"{server.url}/m", root)
    for revalidate in ("never", "1h"):
        server.clear()
        assert stage_small(f"{server.url}/m", root, revalidate=revalidate).snapshot == first.snapshot
        assert server.requests() == []
    stage_small(f"{server.url}/m", root, revalidate="always")
    assert server.requests() != []


def test_with_the_origin_down_what_is_staged_serves_and_says_so(root: Path) -> None:
    with FaultyServer(below("m", MODEL)) as server:
        reference = f"{server.url}/m"
        first = stage_small(reference, root)
    again = stage_small(reference, root, revalidate="always")
    assert again.snapshot == first.snapshot
    assert visible(root) == MODEL
    assert any("cannot be reached" in note and "staged earlier" in note for note in again.notes)
    with pytest.raises(OriginUnavailable):
        stage_small(f"{reference}/other", root)


def test_with_the_origin_down_half_of_a_model_does_not_serve(root: Path) -> None:
    faults = [
        Fault(
            "status",
            path=f"m/{SHARD}",
            status=403,
            methods=("GET",),
            header=("range", "bytes=[1-9][0-9][0-9]*"),
        )
    ]
    with FaultyServer(below("m", MODEL), faults=faults) as server:
        reference = f"{server.url}/m"
        with pytest.raises(AccessDenied):
            stage_small(reference, root)
    with pytest.raises(OriginUnavailable):
        stage_small(reference, root, revalidate="always")
    assert visible(root) == {}


def test_a_manifest_that_appears_later_replaces_the_listing(tmp_path: Path, root: Path) -> None:
    reference = write(tmp_path / "m", MODEL)
    before = stage_small(reference, root)
    write(tmp_path / "m", published(MODEL))
    after = stage_small(reference, root)
    assert after.snapshot != before.snapshot
    assert after.sources["origin"] == 0
