"""Manifests round-trip, and nothing malformed is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache import manifest
from headrace.cache.digest import BLAKE3, XXH3, digest_size
from headrace.cache.errors import ManifestError, UnsafePath
from headrace.cache.grid import fixed
from headrace.cache.manifest import Manifest, ManifestFile, Signature
from headrace.cache.origins.protocol import Pin

_names = st.text("abcdefgh", min_size=1, max_size=4)
_hex = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    algorithm = draw(st.sampled_from([XXH3, BLAKE3]))
    width = 2 * digest_size(algorithm)
    files = []
    for path in sorted(draw(st.sets(_names.map(lambda n: f"{n}.bin"), max_size=5))):
        size = draw(st.integers(0, 1 << 20))
        grid = fixed(size, 1 << 16)
        digits = st.text("0123456789abcdef", min_size=width, max_size=width)
        chunks = draw(st.none() | st.lists(digits, min_size=len(grid), max_size=len(grid)).map(tuple))
        digest = draw(st.none() | _hex.map("sha256:{}".format))
        pin = draw(st.none() | st.builds(Pin, st.sampled_from(["etag", "version"]), st.text(max_size=5)))
        files.append(ManifestFile(path, size, grid, digest, chunks, pin))
    signatures = tuple(Signature(k, v) for k, v in draw(st.lists(st.tuples(_hex, _hex), max_size=2)))
    predecessor = draw(st.none() | _hex.map("sha256:{}".format))
    uri = draw(st.none() | st.just("s3://bucket/model"))
    key = draw(st.none() | _hex)
    return Manifest(tuple(files), algorithm, draw(st.booleans()), predecessor, signatures, uri, None, key)


@given(manifests())
def test_the_stored_form_keeps_everything(one: Manifest) -> None:
    assert manifest.parse(one.to_stored(), "here") == one


@given(manifests())
def test_the_published_form_keeps_what_a_publisher_says(one: Manifest) -> None:
    back = manifest.parse(one.to_published(), "here")
    assert back.published
    assert back.canonical() == one.canonical()
    assert back.digest == one.digest
    assert all(f.pin is None for f in back.files)


def example(**changes: object) -> dict[str, Any]:
    entry: dict[str, object] = {
        "path": "a.bin",
        "size": 3,
        "lengths": [[3, 1]],
        "digest": None,
        "chunks": ["0" * 32],
    }
    entry.update(changes)
    body = {"algorithm": XXH3, "predecessor": None, "files": [entry]}
    return {"headrace": 1, "manifest": body, "signatures": []}


def test_the_example_is_accepted() -> None:
    assert manifest.parse(json.dumps(example()).encode(), "here").size == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 4}, "add up to 3"),
        ({"size": "3"}, "lacks its path or its size"),
        ({"path": 5}, "lacks its path or its size"),
        ({"digest": "md5:00"}, "not a sha256"),
        ({"chunks": ["0" * 30]}, "32 hexadecimal"),
        ({"chunks": ["G" * 32]}, "32 hexadecimal"),
        ({"chunks": []}, "0 chunk digests for 1"),
        ({"lengths": "x"}, "not a list"),
    ],
)
def test_a_file_entry_that_contradicts_itself_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        manifest.parse(json.dumps(example(**changes)).encode(), "here")


@pytest.mark.parametrize("path", ["../a", "/a", "a/../b", "a\0b", "a//b", "./a", "", "a\\b", "x" * 300])
def test_a_path_that_must_not_be_written_is_refused(path: str) -> None:
    with pytest.raises(UnsafePath, match="nothing was written"):
        manifest.parse(json.dumps(example(path=path)).encode(), "here")


def test_an_absurd_size_is_refused() -> None:
    with pytest.raises(UnsafePath, match="no model file has"):
        manifest.parse(json.dumps(example(size=1 << 60)).encode(), "here")


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    top = example()
    edit(top)
    return json.dumps(top).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a headrace manifest"),
        (b"[]", "lacks the object"),
        (b"<html>", "not a headrace manifest"),
        (b"[" * 100_000, "not a headrace manifest"),
        (edited(lambda t: t.update(headrace=2)), "upgrade headrace"),
        (edited(lambda t: t["manifest"].update(algorithm="md5")), "md5"),
        (edited(lambda t: t["manifest"].update(files={})), "not a list"),
        (edited(lambda t: t["manifest"].update(predecessor=5)), "not text"),
        (edited(lambda t: t.update(signatures=[{"algorithm": "rsa"}])), "ed25519"),
        (edited(lambda t: t.update(source=5)), "not an object"),
        (edited(lambda t: t.update(source={"pins": {"a.bin": "x"}})), "version pin"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(data: bytes, says: str) -> None:
    with pytest.raises(ManifestError, match=says) as refused:
        manifest.parse(data, "s3://bucket/headrace.manifest.json")
    assert "s3://bucket/headrace.manifest.json" in str(refused.value)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_end_in_our_error(data: bytes) -> None:
    with pytest.raises((ManifestError, UnsafePath)):
        manifest.parse(data, "here")


def file(**changes: Any) -> ManifestFile:
    values: dict[str, Any] = {"path": "a", "size": 3, "grid": fixed(3), "digest": f"sha256:{'0' * 64}"}
    return ManifestFile(**{**values, **changes})


def test_the_snapshot_id_follows_content_and_domain_but_not_where_it_came_from() -> None:
    one = Manifest((file(pin=Pin("etag", "x")),), uri="s3://a/b")
    same = Manifest((file(pin=Pin("etag", "y")),), uri="s3://c/d")
    assert one.snapshot_id("default") == same.snapshot_id("default")
    assert one.snapshot_id("default") != one.snapshot_id("tenant")
    assert one.snapshot_id("default") != Manifest((file(path="b"),)).snapshot_id("default")


def test_without_digests_the_version_pin_is_the_identity() -> None:
    one = Manifest((file(digest=None, pin=Pin("etag", "x")),), uri="s3://a/b")
    changed = Manifest((file(digest=None, pin=Pin("etag", "y")),), uri="s3://a/b")
    elsewhere = Manifest((file(digest=None, pin=Pin("etag", "x")),), uri="s3://c/d")
    assert len({m.snapshot_id("default") for m in (one, changed, elsewhere)}) == 3


def test_the_object_id_follows_grid_and_algorithm() -> None:
    ids = set()
    for algorithm in (XXH3, BLAKE3):
        for chunk in (1, 2):
            one = Manifest((file(grid=fixed(3, chunk)),), algorithm)
            ids.add(one.object_id("default", one.files[0]))
    assert len(ids) == 4
