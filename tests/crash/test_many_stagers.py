"""Several processes stage at once: each chunk is fetched once, and whoever is left finishes the job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.crashes import assert_nothing_wrong, many_small_files, marked, wait_until_marked
from support.faulty_server import FaultyServer
from support.killing import IN_FLIGHT
from support.models import below, published, small_model, stage_small, visible
from support.processes import Launcher, Victim, is_staging

MODEL = many_small_files(small_model(), 4)
SIZE = sum(map(len, MODEL.values()))
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(below("model", published(MODEL)), rate=4e6) as server:
        yield server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def multiplicities(server: FaultyServer) -> set[int]:
    return {times for path in MODEL for times in server.multiplicity(f"model/{path}")}


def again(server: FaultyServer) -> int:
    """Bytes that were fetched more than once, each time but the first."""
    counts = [server.multiplicity(f"model/{path}") for path in MODEL]
    return sum((times - 1) * size for count in counts for times, size in count.items())


def start(launcher: Launcher, server: FaultyServer, root: Path, count: int = 1) -> list[Victim]:
    return [launcher.start(reference=f"{server.url}/model", root=root) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_each_byte_is_fetched_by_one_of_them(
    launcher: Launcher, server: FaultyServer, root: Path, count: int
) -> None:
    ended = [one.wait() for one in start(launcher, server, root, count)]
    assert visible(root) == MODEL
    assert multiplicities(server) == {1}
    fetched = [one.result["sources"]["origin"] for one in ended]
    assert sum(fetched) == SIZE
    assert len({one.result["snapshot"] for one in ended}) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_the_survivors_take_over_what_a_killed_one_had_claimed(
    launcher: Launcher, server: FaultyServer, root: Path, count: int
) -> None:
    victim, *others = start(launcher, server, root, count)
    wait_until_marked(root, SIZE // 4)
    victim.kill()
    before = marked(root)
    for other in others:
        assert other.wait().code == 0
    assert visible(root) == MODEL
    assert again(server) <= IN_FLIGHT
    assert all(set(spans) <= set(marked(root)[path]) for path, spans in before.items())


def test_a_stopped_one_keeps_its_claims_and_goes_on_later(
    launcher: Launcher, server: FaultyServer, root: Path
) -> None:
    """The others cannot know whether it still writes, so they leave its chunks alone, and wait."""
    stopped, other = start(launcher, server, root, 2)
    wait_until_marked(root, SIZE // 4)
    while not is_staging(stopped.pid):
        time.sleep(0.005)
    stopped.signal(signal.SIGSTOP)
    wait_until_still(root)
    assert_nothing_wrong(root, MODEL)
    assert visible(root) == {}
    stopped.signal(signal.SIGCONT)
    assert stopped.wait().code == other.wait().code == 0
    assert visible(root) == MODEL
    assert multiplicities(server) == {1}


def test_a_stopped_one_that_is_killed_leaves_its_chunks_to_the_others(
    launcher: Launcher, server: FaultyServer, root: Path
) -> None:
    stopped, other = start(launcher, server, root, 2)
    wait_until_marked(root, SIZE // 4)
    while not is_staging(stopped.pid):
        time.sleep(0.005)
    stopped.signal(signal.SIGSTOP)
    wait_until_still(root)
    stopped.kill()
    assert other.wait().code == 0
    assert visible(root) == MODEL
    assert again(server) <= IN_FLIGHT


def wait_until_still(root: Path) -> None:
    """Return when no chunk has arrived for a while."""
    seen, since = marked(root), time.monotonic()
    while time.monotonic() - since < 0.7:
        time.sleep(0.05)
        now = marked(root)
        if now != seen:
            seen, since = now, time.monotonic()


def test_a_killed_worker_costs_only_what_it_had_in_flight(
    launcher: Launcher, server: FaultyServer, root: Path
) -> None:
    assert server.pace is not None
    server.pace.rate = 5e5
    victim = launcher.start(reference=f"{server.url}/model", root=root, workers=2)
    while not (workers := [pid for pid in victim.workers() if is_staging(pid)]):
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    server.pace.rate = 1e7
    assert victim.wait().code == 0
    assert visible(root) == MODEL
    assert again(server) <= IN_FLIGHT


def test_files_shared_with_a_model_that_is_still_filling_are_fetched_once(
    launcher: Launcher, root: Path
) -> None:
    """The first becomes complete and is shown while the second, which has one shard more, still fills."""
    extra = small_model(seed=7, tensors=9)[SHARD]
    second = {**MODEL, "model-00003.safetensors": extra}
    files = {**below("one", published(MODEL)), **below("two", published(second))}
    with FaultyServer(files, rate=3e6) as server:
        tasks = [launcher.start(reference=f"{server.url}/{name}", root=root) for name in ("two", "one")]
        snapshots = [one.wait().result["snapshot"] for one in tasks]
        folders = [root / "domains/default/snapshots" / snapshot / "files" for snapshot in snapshots]
        for path, data in second.items():
            assert (folders[0] / path).read_bytes() == data
            if path in MODEL:
                assert (folders[0] / path).samefile(folders[1] / path)
        total = sum(server.bytes_sent(f"*/{path}") for path in second)
        assert total == sum(map(len, second.values()))


def test_a_loader_takes_over_when_the_process_that_stages_is_killed(
    launcher: Launcher, server: FaultyServer, root: Path
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="needs torch and safetensors to compare with"
    )
    loader = pytest.importorskip("headrace.loader", reason="needs torch")
    (victim,) = start(launcher, server, root)
    wait_until_marked(root, SIZE // 5)
    stream = loader.stream(f"{server.url}/model", root=str(root))
    loaded: dict[str, Any] = {}
    for name, tensor in stream:
        if not loaded:
            victim.kill()
        loaded[name] = tensor.clone()
    for path, data in MODEL.items():
        if path.endswith(".safetensors"):
            for name, tensor in safetensors.load(data).items():
                # As whole numbers: among random bits some are no numbers, which equal nothing.
                assert loaded.pop(name).view(torch.int32).equal(tensor.view(torch.int32))
    assert not loaded
    stage_small(f"{server.url}/model", root)
    assert visible(root) == MODEL
    assert again(server) <= IN_FLIGHT
