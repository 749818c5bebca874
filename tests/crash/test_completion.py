"""Chunks that are taken back between the last mark and the completion are fetched again, not published."""

from __future__ import annotations

import os
import time
from pathlib import Path

from support.faulty_server import FaultyServer
from support.models import (
    CHUNK,
    PATIENT,
    below,
    grid_of,
    published,
    small_model,
    visible,
)
from support.stores import flip

from headrace.cache import locks
from headrace.cache.chunkmap import ABSENT, ChunkMap
from headrace.cache.object import WHOLE, ObjectFolder
from headrace.cache.prepare import StageRequest
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StagingJob
from headrace.cache.store import Store

SHARD = "model-00001-of-00002.safetensors"
MODEL = {SHARD: small_model(tensors=3)[SHARD]}
GRID = grid_of(SHARD, MODEL[SHARD])


def wait_for_full_object(root: Path) -> ObjectFolder:
    while True:
        time.sleep(0.005)
        for path in root.glob("domains/*/objects/*/map"):
            with ChunkMap.open(path, writable=False) as chunk_map:
                if chunk_map.full:
                    return ObjectFolder(path.parent)


def test_what_a_repair_takes_back_just_before_completion_is_fetched_again(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with FaultyServer(below("model", published(MODEL)), rate=2e6) as server:
        limits = StagerLimits(span=CHUNK, connections=2, reserve=0)
        job = StagingJob(
            StageRequest(
                f"{server.url}/model", str(root), "default", options=PATIENT, limits=limits, workers=1
            )
        )
        job.start()
        assert job.prepared.wait(10)
        assert job.opened is not None
        with Store.open(root, writable=False) as store:
            (folder,) = store.domain().objects()
        other = os.open(folder.lock, os.O_RDWR)
        # As another stager would: this one cannot complete.
        locks.lock(other, WHOLE, 1, exclusive=False)
        assert wait_for_full_object(root).id == folder.id
        server.clear()
        # As a repair does, in the moment when every stager has let go.
        assert locks.lock(other, WHOLE, 1, exclusive=True, timeout=10)
        flip(folder.partial, GRID.offsets[2])
        with ChunkMap.open(folder.map, writable=True) as chunk_map:
            chunk_map.mark(2, ABSENT)
        os.close(other)
        job.wait()
        assert visible(root) == MODEL
        assert server.multiplicity(f"model/{SHARD}") == {1: GRID.lengths[2]}
