"""Killed while the same bytes under a second address become the inode of the first."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.crashes import assert_nothing_wrong, leftovers
from support.models import published, small_model, stage_small, visible
from support.processes import Launcher
from support.stores import write_files

from headrace.cache import object as objects
from headrace.cache.evict import collect
from headrace.cache.object import ObjectWriter
from headrace.cache.store import Store

MODEL = small_model(tensors=3)


@pytest.mark.parametrize(("step", "digests"), [(ObjectWriter.adopt, True), (objects.share, False)])
def test_killed_at_any_line_of_it(tmp_path: Path, step: Any, digests: bool) -> None:
    """By its publisher's digests a twin is adopted; without them it is fetched, compared and shared."""
    one = write_files(tmp_path / "one", MODEL)
    two = write_files(tmp_path / "two", published(MODEL) if digests else MODEL)
    saved, root = tmp_path / "saved", tmp_path / "store"
    stage_small(str(one), saved)
    source, first = inspect.getsourcelines(step)
    with Launcher() as launcher:

        def stage_two(**how: Any) -> Any:
            shutil.rmtree(root, ignore_errors=True)
            # Hard links and all.
            subprocess.run(["cp", "-a", str(saved), str(root)], check=True)
            return launcher.start(reference=two, root=root, **how).wait()

        counted = stage_two(count_lines=["object"]).result["lines"]
        lines = [line for _, line, _ in counted if first <= line < first + len(source)]
        assert len(lines) > 5
        for line in lines:
            assert stage_two(die_at_line=["object", line, 1]).killed
            assert_nothing_wrong(root, MODEL)
            stage_small(str(two), root)
            assert visible(root) == MODEL
            with Store.open(root) as store:
                collect(store, leftover_age=0)
            assert leftovers(root) == []
            folders = [snapshot / "files" for snapshot in root.glob("domains/*/snapshots/*")]
            assert len(folders) == 2
            for path, data in MODEL.items():
                assert [(folder / path).read_bytes() for folder in folders] == [data, data]
