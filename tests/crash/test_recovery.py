"""Killed while it recovers from a power loss: the next start recovers, whatever was done already."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.crashes import assert_nothing_wrong, marked, size_of, wait_until_marked
from support.faulty_server import FaultyServer
from support.killing import IN_FLIGHT
from support.models import below, published, small_model, stage_small, visible
from support.processes import Launcher
from support.stores import flip

from headrace.cache import chunkmap
from headrace.cache.chunkmap import WRITTEN, ChunkMap
from headrace.cache.object import ObjectFolder, ObjectWriter

MODEL = small_model(tensors=6)
SIZE = sum(map(len, MODEL.values()))
FIRST, SECOND = (f"{n}" * 8 + "-0000-0000-0000-000000000000" for n in (1, 2))


def lines_of(step: Any) -> set[int]:
    source, first = inspect.getsourcelines(step)
    return set(range(first, first + len(source)))


STEPS = {
    "object": lines_of(ObjectWriter._recover),
    "chunkmap": lines_of(ChunkMap.set_current) | lines_of(ChunkMap.sync),
}


def lose_a_chunk(root: Path) -> int:
    """As a power loss may leave it: a chunk is marked, but its bytes never reached the disk. Its length."""
    for path in root.glob("domains/*/objects/*/partial"):
        folder = ObjectFolder(path.parent)
        grid = folder.spec().grid
        with ChunkMap.open(folder.map, writable=False) as chunk_map:
            written = [i for i, state in enumerate(chunk_map.states()) if state == WRITTEN]
        if len(written) > 2:
            flip(path, grid.offsets[written[1]])
            return grid.lengths[written[1]]
    raise AssertionError("no object was filling")


def test_a_recovery_that_is_killed_at_any_line_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, saved = tmp_path / "store", tmp_path / "saved"
    kills = 0
    with Launcher() as launcher, FaultyServer(below("model", published(MODEL)), rate=2e6) as server:
        reference = f"{server.url}/model"
        victim = launcher.start(reference=reference, root=saved, boot=FIRST)
        monkeypatch.setattr(chunkmap, "boot_id", lambda: FIRST)
        wait_until_marked(saved, SIZE // 2)
        victim.kill()
        left = SIZE - size_of(marked(saved)) + lose_a_chunk(saved)
        monkeypatch.setattr(chunkmap, "boot_id", lambda: SECOND)
        server.pace = None
        shutil.copytree(saved, root)
        counting = launcher.start(reference=reference, root=root, boot=SECOND, count_lines=[*STEPS])
        counted = counting.wait().result["lines"]
        shutil.rmtree(root)
        for module, line, times in counted:
            if line not in STEPS[module]:
                continue
            # The second time is another chunk's, or another object's.
            for nth in range(1, 1 + min(2, times)):
                shutil.copytree(saved, root)
                server.clear()
                task: dict[str, Any] = {"boot": SECOND, "die_at_line": [module, line, nth]}
                if launcher.start(reference=reference, root=root, **task).wait().killed:
                    kills += 1
                    assert_nothing_wrong(root, MODEL)
                    stage_small(reference, root)
                assert visible(root) == MODEL
                served = sum(server.bytes_sent(f"model/{path}") for path in MODEL)
                # Recovery comes before anything is in flight; maps are synced later, too.
                assert left <= served <= left + (0 if module == "object" else IN_FLIGHT)
                shutil.rmtree(root)
    assert kills > 10


def test_several_stagers_make_torn_objects_again_once(tmp_path: Path) -> None:
    """A power loss may leave young objects with empty files; everyone who starts then finds them."""
    root = tmp_path / "store"
    with Launcher() as launcher, FaultyServer(below("model", published(MODEL)), rate=2e6) as server:
        reference = f"{server.url}/model"
        victim = launcher.start(reference=reference, root=root)
        wait_until_marked(root, SIZE // 4)
        victim.kill()
        for number, folder in enumerate(sorted(root.glob("domains/*/objects/*"))):
            if not (folder / "data").exists():
                (folder / ("grid", "map", "digests")[number % 3]).write_bytes(b"")
        had = sum(p.stat().st_size for p in root.glob("domains/*/objects/*/data"))
        server.clear()
        server.pace = None
        everyone = [launcher.start(reference=reference, root=root) for _ in range(4)]
        assert ["error" in one.wait().result for one in everyone] == [False] * 4
        assert visible(root) == MODEL
        assert sum(server.bytes_sent(f"model/{path}") for path in MODEL) == SIZE - had
