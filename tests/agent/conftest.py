"""An agent, the commands of its user, a small model on disk, and one that comes slowly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.agents import RunningAgent
from support.command import Command
from support.faulty_server import FaultyServer
from support.models import below, small_model
from support.stores import write_files


@pytest.fixture
def headrace(tmp_path: Path) -> Command:
    """Commands of a user for whom there is no agent, until a test says where one is."""
    home = tmp_path / "home"
    home.mkdir()
    return Command(home, tmp_path / "store", {"HEADRACE_SOCKET": str(tmp_path / "none.sock")})


@pytest.fixture
def agent(headrace: Command) -> Iterator[RunningAgent]:
    """A running agent; a test may stop, kill and start it again."""
    # A socket's path has to be short, and a test's own folder may have a long name.
    with TemporaryDirectory(prefix="headrace-") as folder, RunningAgent(headrace, Path(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One agent for all tests of a module that leave it as it is."""
    folder = tmp_path_factory.mktemp("agent")
    (folder / "home").mkdir()
    command = Command(folder / "home", folder / "store", {"HEADRACE_SOCKET": str(folder / "none.sock")})
    with RunningAgent(command, folder / "agent") as running:
        yield running


@pytest.fixture
def files() -> dict[str, bytes]:
    return small_model()


@pytest.fixture
def model(tmp_path: Path, files: dict[str, bytes]) -> Path:
    return write_files(tmp_path / "model", files)


@pytest.fixture
def slow(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    """Takes about a second for the model."""
    with FaultyServer(below("m", files), rate=2.5e6) as server:
        yield server
