"""Power loss while staging, short form of `campaigns/power_loss.py`: nothing wrong is ever trusted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.crashes import many_small_files
from support.faulty_server import FaultyServer
from support.loop import Losses, Outage, disk
from support.models import below, published, small_model
from support.mounts import needs, needs_root
from support.processes import Launcher

MODEL = many_small_files(small_model(tensors=6), 2)


@needs_root
@needs("mkfs.xfs")
@needs("unshare")
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_the_next_boot_trusts_only_what_is_right(tmp_path: Path, kind: str) -> None:
    losses = Losses()
    with (
        disk(kind, tmp_path) as where,
        Launcher() as launcher,
        FaultyServer(below("model", published(MODEL)), rate=1.5e6) as server,
    ):
        outage = Outage(launcher, server, where, MODEL, tmp_path)
        outage.lose_power(losses, random.Random(kind), 3)
    assert losses.clones == 3
    assert losses.chunks["read after recovery"] > 0
