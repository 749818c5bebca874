"""A new revision moves what changed, and what others hold of an older one comes from them."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
from support import revisions
from support.faulty_server import FaultyServer
from support.models import below, published, small_model
from swarm.conftest import Make

from headrace.cache.publish import publish

BASE = revisions.transformer(hidden=256, inner=1376, vocab=9496, layers=12)
CHUNK = 256 << 10  # stands for 4 MiB, as the model stands for one of 16 times its size
MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def published_revisions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with `one` and its successor `two`, of which about 5 % is new; how many bytes those are."""
    folder = tmp_path_factory.mktemp("revisions")
    BASE.write(folder / "one")
    first = publish(folder / "one", str(folder / "published" / "one"), chunk=CHUNK)
    changed, new = revisions.changed(BASE, 0.05, 1)
    changed.write(folder / "two")
    publish(folder / "two", str(folder / "published" / "two"), chunk=CHUNK, predecessor=first.digest)
    return folder / "published", new


def test_what_others_hold_of_the_predecessor_is_not_read_from_the_origin(
    make: Make, published_revisions: tuple[Path, int]
) -> None:
    folder, new = published_revisions
    with FaultyServer(directory=folder) as server:
        one, two = f"{server.url}/one", f"{server.url}/two"
        holders, fresh, third = [make(), make()], make(), make()
        for node in holders:
            node.stage(one)
        server.clear()
        # It has nothing at all: what is new comes from the origin, the rest from those that have the first.
        report = fresh.stage(two)
        assert new <= report.sources["origin"] <= 0.07 * report.bytes
        assert report.sources["peer"] == report.bytes - report.sources["origin"]
        assert server.bytes_sent("two/*.safetensors") == report.sources["origin"]
        server.clear()
        # It has the first, and somebody has what is new.
        moved = holders[0].stage(two)
        assert moved.sources["origin"] == 0
        assert moved.sources["peer"] <= 0.07 * moved.bytes
        assert moved.sources["local"] == moved.bytes - moved.sources["peer"]
        last = third.stage(two)
        assert last.sources["peer"] == report.bytes
        assert server.bytes_sent("two/*.safetensors") == 0
        for staged in (report, moved, last):
            for file in (folder / "two").glob("*.safetensors"):
                assert filecmp.cmp(file, Path(staged.path, file.name), shallow=False), staged.path
        # Both revisions live side by side.
        with_both = {p.parent.name for p in holders[0].root.glob("domains/default/snapshots/*/files")}
        assert len(with_both) == 2


def test_without_published_digests_files_that_did_not_change_come_from_others(make: Make) -> None:
    """The same address, another revision: one file of it is another one now."""
    later = {**MODEL, SHARD: small_model(seed=1)[SHARD]}
    with FaultyServer(below("model", MODEL)) as server:
        reference = f"{server.url}/model"
        make().stage(reference)
        server.files = below("model", later)
        server.clear()
        node = make(grace=0.0)
        report = node.stage(reference)
        assert node.files() == later
        assert report.sources["origin"] == server.bytes_sent("model/*.safetensors")
        assert report.sources["origin"] <= len(later[SHARD]) + 2000
        assert report.sources["peer"] >= SIZE - len(later[SHARD]) - 2000


def test_kin_that_cannot_be_had_comes_from_the_origin(make: Make) -> None:
    later = {**MODEL, SHARD: small_model(seed=1)[SHARD]}
    with FaultyServer({**below("one", published(MODEL)), **below("two", published(later))}) as server:
        gone, node = make(), make(grace=0.0)
        gone.stage(f"{server.url}/one")
        server.files = below("one", published(later))
        gone.known_as("127.0.0.1:1")
        gone.announce()
        report = node.stage(f"{server.url}/one")
        assert node.files() == later
        assert report.sources["origin"] == SIZE
