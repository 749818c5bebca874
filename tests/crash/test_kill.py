"""`kill -9` while staging, short form of `campaigns/kills.py`: a crash costs at most what was in flight."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crashes import assert_nothing_wrong, many_small_files
from support.faulty_server import FaultyServer
from support.killing import Round, Scene, Tally, random_kills
from support.models import below, published, small_model, stage_small, visible
from support.processes import Launcher, is_staging
from support.stores import write_files

from headrace.cache.evict import collect
from headrace.cache.store import Store

MODEL = many_small_files(small_model(tensors=6), 4)
MODULES = [
    "chunkmap",
    "durable",
    "fetching",
    "filling",
    "learned",
    "object",
    "prepare",
    "snapshot",
    "stager",
    "store",
]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(params=["published", "listed"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scene(launcher: Launcher, tmp_path: Path, how: str) -> Iterator[Scene]:
    files = published(MODEL) if how == "published" else MODEL
    with FaultyServer(below("model", files), rate=8e6) as server:
        yield Scene(launcher, server, MODEL, tmp_path)


def test_killed_at_random_moments(scene: Scene, how: str) -> None:
    tally = Tally()
    random_kills(scene, tally, 1, 4, published=how == "published")
    assert tally.kills == 4


@pytest.mark.parametrize("call", ["rename", "link", "fsync", "pwrite"])
def test_killed_before_and_after_one_of_its_calls(scene: Scene, how: str, call: str) -> None:
    choose = random.Random(call)
    tally = Tally()
    one = Round(scene, tally, "store", published=how == "published")
    for _ in range(3):
        one.die(die_at_call=[call, choose.randint(1, 5), choose.choice(["before", "after"])])
    assert tally.kills == 3
    one.finish()


def test_killed_at_lines_of_the_store(scene: Scene, how: str) -> None:
    tally = Tally()
    counted = scene.start(scene.root / "counted", count_lines=MODULES).wait().result["lines"]
    for number, (module, line, times) in enumerate(random.Random(2).sample(counted, 8)):
        one = Round(scene, tally, f"store-{number}", published=how == "published")
        one.die(die_at_line=[module, line, random.Random(number).randint(1, times)])
        one.finish()
    assert tally.kills > 4


def test_killed_with_its_workers(scene: Scene, how: str) -> None:
    assert scene.server.pace is not None
    scene.server.pace.rate = 3e5
    one = Round(scene, Tally(), "store", published=how == "published", workers=2)
    victim = scene.start(one.root, workers=2)
    while not any(is_staging(pid) for pid in victim.workers()):
        time.sleep(0.01)
    assert one.look(victim.kill())
    scene.server.pace.rate = 1e7
    one.finish()


def test_killed_while_a_trust_domain_is_made(launcher: Launcher, tmp_path: Path) -> None:
    """Half of one is as good as none for whoever looks, and whole again for whoever stages."""
    origin = write_files(tmp_path / "origin", MODEL)
    kills = 0
    for nth in range(1, 9):
        root = tmp_path / f"store-{nth}"
        victim = launcher.start(reference=origin, root=root, die_at_call=["mkdir", nth, "after"])
        kills += victim.wait().killed
        assert_nothing_wrong(root, MODEL)
        if (root / "format").exists():
            with Store.open(root) as store:
                collect(store, leftover_age=0)
        stage_small(str(origin), root)
        assert visible(root) == MODEL
    assert kills == 8
