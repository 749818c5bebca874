"""Per-pod sockets: what a pod may know of its volume's snapshots, and that it may nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from support.agents import RunningAgent
from support.command import wait_until
from support.faulty_server import FaultyServer
from support.models import small_model
from support.stores import write_files

from headrace.cache.errors import NotAllowed, UsageError
from headrace.prefetch.client import AgentClient


def staged(agent: RunningAgent, reference: object) -> str:
    lines = list(agent.client.stream("POST", "/v1/stage", {"request": {"reference": str(reference)}}))
    snapshot: str = lines[-1]["report"]["snapshot"]
    return snapshot


def volume(agent: RunningAgent, name: str, *snapshots: str) -> AgentClient:
    made = agent.client.ask("POST", "/v1/volumes", {"volume": name, "snapshots": list(snapshots)})
    return AgentClient(made["socket"])


@pytest.fixture(scope="module")
def shared(lasting: RunningAgent, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two snapshots of the agent that lasts."""
    model = write_files(tmp_path_factory.mktemp("models") / "one", small_model())
    other = write_files(tmp_path_factory.mktemp("models") / "other", small_model(1))
    return staged(lasting, model), staged(lasting, other)


@pytest.fixture
def two(agent: RunningAgent, model: Path, tmp_path: Path) -> tuple[str, str]:
    """Two snapshots of an agent that ends in the test."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    return staged(agent, model), staged(agent, other)


def test_a_pod_sees_its_own_snapshot(lasting: RunningAgent, shared: tuple[str, str]) -> None:
    pod = volume(lasting, "pvc-0a", shared[0])
    assert stat.S_IMODE(os.stat(pod.path).st_mode) == 0o666
    for path in ("/v1/snapshot", "/v1/wait"):
        found = pod.ask("GET", path)
        assert (found["snapshot"], found["staged"]) == (shared[0], True)
        # What is not the pod's business is not there: where the store is, who else uses it.
        assert set(found) == {"snapshot", "files", "bytes", "present", "staged"}
    assert pod.ask("GET", "/v1/snapshot", id=shared[0])["snapshot"] == shared[0]


def test_a_pod_is_refused_another_volumes_snapshot(lasting: RunningAgent, shared: tuple[str, str]) -> None:
    first, second = volume(lasting, "pvc-1a", shared[0]), volume(lasting, "pvc-1b", shared[1])
    for pod, foreign in ((first, shared[1]), (second, shared[0]), (first, "0" * 64)):
        for path in ("/v1/snapshot", "/v1/progress", "/v1/wait"):
            with pytest.raises(NotAllowed, match="is not one of this volume's"):
                pod.ask("GET", path, id=foreign)
    # A prefix, which the administrator may use, opens nothing either.
    with pytest.raises(NotAllowed):
        first.ask("GET", "/v1/snapshot", id=shared[0][:12])


ADMINISTRATOR: list[tuple[str, str]] = [
    ("GET", "/v1/agent"),
    ("GET", "/v1/status"),
    ("POST", "/v1/stage"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/000001"),
    ("DELETE", "/v1/jobs/000001"),
    ("GET", "/v1/snapshots"),
    ("POST", "/v1/pin"),
    ("POST", "/v1/unpin"),
    ("POST", "/v1/remove"),
    ("POST", "/v1/verify"),
    ("GET", "/v1/explain"),
    ("POST", "/v1/reload"),
    ("GET", "/v1/volumes"),
    ("POST", "/v1/volumes"),
    ("DELETE", "/v1/volumes/pvc-2a"),
    ("POST", "/v1/snapshot"),
    ("GET", "/metrics"),
    ("GET", "/"),
]


def test_a_pod_may_do_nothing_of_the_administrator(lasting: RunningAgent, shared: tuple[str, str]) -> None:
    pod = volume(lasting, "pvc-2a", shared[0])
    for method, path in ADMINISTRATOR:
        with pytest.raises(NotAllowed, match="nothing else"):
            pod.ask(method, path, {"name": shared[0]} if method == "POST" else None)
        with lasting.raw(method, path, b"", pod.path) as answer:
            assert answer.status == 403, (method, path)
    assert pod.path in [one["socket"] for one in lasting.client.ask("GET", "/v1/volumes")["volumes"]]


def test_a_pod_follows_what_is_still_coming(agent: RunningAgent, slow: FaultyServer) -> None:
    agent.client.ask("POST", "/v1/stage", {"request": {"reference": f"{slow.url}/m"}, "wait": False})

    def opened() -> Any:
        return agent.client.ask("GET", "/v1/jobs")["jobs"][0]["snapshot"]

    wait_until(lambda: opened() is not None)
    pod = volume(agent, "pvc-1", opened())
    assert not pod.ask("GET", "/v1/wait", timeout="0")["staged"]
    lines = []
    for line in pod.stream("GET", "/v1/progress"):
        lines.append(line["progress"])
        slow.pace = None
    assert lines[-1]["staged"]
    assert [line["present"] for line in lines] == sorted(line["present"] for line in lines)
    assert len(lines) > 1


def test_volumes_outlive_the_agent(agent: RunningAgent, two: tuple[str, str]) -> None:
    first, second = volume(agent, "pvc-1", two[0]), volume(agent, "pvc-2", two[1])
    agent.kill()
    with agent:
        assert first.ask("GET", "/v1/snapshot")["snapshot"] == two[0]
        agent.client.ask("DELETE", "/v1/volumes/pvc-1")
        assert agent.stop() == 0
    with agent:
        assert second.ask("GET", "/v1/snapshot")["snapshot"] == two[1]
        assert [one["volume"] for one in agent.client.ask("GET", "/v1/volumes")["volumes"]] == ["pvc-2"]
        assert not os.path.exists(first.path)


def test_a_damaged_record_costs_its_own_volume_only(agent: RunningAgent, two: tuple[str, str]) -> None:
    volume(agent, "pvc-1", two[0])
    pod = volume(agent, "pvc-2", two[1])
    agent.kill()
    (agent.folder / "volumes" / "pvc-1" / "volume.json").write_text("{")
    with agent:
        assert pod.ask("GET", "/v1/snapshot")["snapshot"] == two[1]
        assert "is not served" in agent.log()


def test_asking_twice_is_no_error_and_other_snapshots_are(
    lasting: RunningAgent, shared: tuple[str, str]
) -> None:
    assert volume(lasting, "v", shared[0]).path == volume(lasting, "v", shared[0]).path
    with pytest.raises(UsageError, match="other snapshots"):
        volume(lasting, "v", shared[1])
    for name in ("../up", "a/b", "", ".hidden", "x" * 200):
        with pytest.raises(UsageError):
            volume(lasting, name, shared[0])
    with pytest.raises(UsageError, match="2 snapshots"):
        volume(lasting, "both", *shared).ask("GET", "/v1/snapshot")
