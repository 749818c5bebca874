"""Where a store may be, who may write it, and that several are strangers to each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.fuse_mount import fuse
from support.models import below, small_model, stage_small, visible
from support.mounts import needs_root, read_only
from support.stores import opened

from headrace.cache.errors import (
    HeadraceError,
    NotStaged,
    StoreNotWritable,
    StoreVersion,
    UnsuitableFilesystem,
    UsageError,
)
from headrace.cache.evict import remove
from headrace.cache.store import NODE_ROOT, Store, default_root
from headrace.cache.verify import verify

MODEL = small_model()


def refused(root: Path, kind: type[HeadraceError], *, writable: bool = True) -> str:
    """The one sentence with which a root is refused."""
    with pytest.raises(kind) as caught:
        Store.open(root, writable=writable)
    text = str(caught.value)
    assert str(root) in text
    assert "\n" not in text
    return text


def test_several_roots_are_independent(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    with FaultyServer(below("model", MODEL)) as server:
        reports = [stage_small(f"{server.url}/model", root) for root in roots]
    assert reports[0].snapshot == reports[1].snapshot
    assert [r.sources["origin"] for r in reports] == [sum(map(len, MODEL.values()))] * 2
    with opened(roots[0], reports[0].snapshot) as it:
        remove(it.store, it.domain, it.snapshot)
    assert visible(roots[0]) == {}
    assert visible(roots[1]) == MODEL
    with opened(roots[1], reports[1].snapshot) as it:
        assert verify(it.store, it.domain, it.snapshot).ok


def test_the_environment_names_the_root_and_else_the_user_has_one(tmp_path: Path) -> None:
    assert default_root({"HEADRACE_ROOT": str(tmp_path)}) == tmp_path
    cache = default_root({"XDG_CACHE_HOME": str(tmp_path)})
    assert cache in (tmp_path / "headrace", NODE_ROOT)


def test_a_folder_with_other_things_in_it_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    assert "not empty and not a headrace store" in refused(tmp_path, UsageError)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert "is a file" in refused(tmp_path / "file", UsageError)


def test_reading_makes_no_store(tmp_path: Path) -> None:
    assert "there is no store" in refused(tmp_path / "none", NotStaged, writable=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("writable", [True, False])
def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path, writable: bool) -> None:
    Store.open(tmp_path / "store").close()
    (tmp_path / "store" / "format").write_text(json.dumps({"format": 99}))
    leftover = tmp_path / "store" / "tmp" / "newer"
    leftover.mkdir()
    assert "upgrade headrace" in refused(tmp_path / "store", StoreVersion, writable=writable)
    assert leftover.exists()


def test_a_torn_format_file_is_said_so(tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    (tmp_path / "store" / "format").write_bytes(b"")
    assert "no readable `format`" in refused(tmp_path / "store", StoreVersion)


@needs_root
def test_a_read_only_store_serves_and_takes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with FaultyServer(below("model", MODEL)) as server:
        snapshot = stage_small(f"{server.url}/model", root).snapshot
    with read_only(root):
        refused(root, StoreNotWritable)
        with opened(root, snapshot, writable=False) as it:
            hold = it.snapshot.hold()
            assert hold is not None
            assert verify(it.store, it.domain, it.snapshot).ok
            with pytest.raises(StoreNotWritable, match="Read-only"):
                remove(it.store, it.domain, it.snapshot)
            os.close(hold)
    assert visible(root) == MODEL


@needs_root
def test_a_read_only_place_for_a_new_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with read_only(tmp_path / "place"):
        assert "Read-only" in refused(tmp_path / "place" / "store", StoreNotWritable)


@needs_root
def test_a_fuse_file_system_is_refused_by_its_name(tmp_path: Path) -> None:
    with fuse(tmp_path / "mounted") as point:
        text = refused(point / "store", UnsuitableFilesystem)
    assert "fuse" in text
    assert str(tmp_path / "mounted") in text


def test_domains_are_plain_names(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        assert store.domain("tenant-a").path.stat().st_mode & 0o777 == 0o700
        assert store.domain().path.stat().st_mode & 0o777 == 0o755
        for name in ("../x", "a/b", ".hidden", ""):
            with pytest.raises(HeadraceError):
                store.domain(name)
