"""The command, a small model on disk, and a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command
from support.models import small_model
from support.seaweedfs import SeaweedFS
from support.stores import write_files


@pytest.fixture
def headrace(tmp_path: Path) -> Command:
    home = tmp_path / "home"
    home.mkdir()
    return Command(home, tmp_path / "store")


@pytest.fixture
def files() -> dict[str, bytes]:
    """A model of two shards, 3 MB, with the same weights in another format beside."""
    return {**small_model(), "pytorch_model.bin": b"the same weights"}


@pytest.fixture
def model(tmp_path: Path, files: dict[str, bytes]) -> Path:
    return write_files(tmp_path / "model", files)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One S3 server for the session; each test takes a bucket of its own."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server
