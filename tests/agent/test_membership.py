"""Agents of several nodes: they serve each other, know of each other, and take leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agents import RunningAgent
from support.command import Command, wait_until
from support.models import published
from support.mounts import needs
from support.redis_server import RedisServer
from support.stores import read_files, write_files

pytestmark = needs("redis-server")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("one-secret-for-all-nodes-of-a-test\n")
    return path


def node(tmp_path: Path, name: str, secret: Path, **more: dict[str, Any]) -> RunningAgent:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    sections: dict[str, dict[str, Any]] = {
        "node": {"name": name},
        "peers": {"listen": "127.0.0.1:0", "secrets": {"default": str(secret)}, "heartbeat": 0.2},
    }
    for section, values in more.items():
        sections.setdefault(section, {}).update(values)
    command = Command(home, tmp_path / name / "store", {"HEADRACE_SOCKET": str(tmp_path / "none.sock")})
    return RunningAgent(command, tmp_path / name, sections)


def cluster(agent: RunningAgent) -> dict[str, Any]:
    found: dict[str, Any] = agent.client.ask("GET", "/v1/status")["cluster"]
    return found


def sources(agent: RunningAgent, reference: Path) -> dict[str, int]:
    report = agent.commands()("stage", reference, "--json").json["snapshots"][0]
    found: dict[str, int] = report["sources"]
    return found


def test_a_second_node_reads_from_the_first_and_nothing_from_the_origin(
    tmp_path: Path, redis: RedisServer, secret: Path, files: dict[str, bytes]
) -> None:
    model = write_files(tmp_path / "model", published(files))
    tracker = {"url": redis.url}
    first, second = (node(tmp_path, name, secret, tracker=tracker) for name in ("a", "b"))
    size = sum(map(len, files.values()))
    with first, second:
        wait_until(lambda: all(len(cluster(one)["members"]) == 1 for one in (first, second)))
        assert sources(first, model)["origin"] == size
        assert sources(second, model) == {"origin": 0, "peer": size, "local": 0}
        (files_of,) = (second.command.root / "domains/default/snapshots").glob("*/files")
        assert read_files(files_of) == files
        assert sum(cluster(first)["uploads"]["sent"].values()) == size
        # Who ends takes leave at once; who is killed is missed after a while.
        assert first.stop() == 0
        wait_until(lambda: cluster(second)["members"] == [])
        # Also right after its start, while it is still making itself known.
        for _ in range(2):
            assert first.start().stop() == 0
        first.start()
        wait_until(lambda: len(cluster(second)["members"]) == 1)
        first.kill()
        wait_until(lambda: cluster(second)["members"] == [])
    assert "Traceback" not in first.log() + second.log()
    assert "one-secret" not in first.log() + second.log()


def test_what_was_staged_before_the_agent_started_is_announced_and_taken_back_when_it_goes(
    tmp_path: Path, redis: RedisServer, secret: Path, files: dict[str, bytes]
) -> None:
    model = write_files(tmp_path / "model", published(files))
    agent = node(tmp_path, "a", secret, tracker={"url": redis.url})
    other = node(tmp_path, "b", secret, tracker={"url": redis.url})
    snapshot = agent.command("stage", model, "--json").json["snapshots"][0]["snapshot"]
    with agent, other:
        wait_until(lambda: cluster(agent)["announced"] == 1)
        assert sources(other, model)["origin"] == 0
        # Another process removes it; the agent notices.
        agent.command("rm", snapshot)
        wait_until(lambda: cluster(agent)["announced"] == 0)


def test_redis_that_goes_and_comes_back_is_noticed(
    tmp_path: Path, redis: RedisServer, secret: Path, files: dict[str, bytes]
) -> None:
    model = write_files(tmp_path / "model", files)
    with node(tmp_path, "a", secret, tracker={"url": redis.url}) as agent:
        assert not cluster(agent)["degraded"]
        redis.kill()
        wait_until(lambda: bool(cluster(agent)["degraded"]))
        assert sources(agent, model)["origin"] == sum(map(len, files.values()))
        redis.start()
        wait_until(lambda: not cluster(agent)["degraded"])
        # The empty Redis hears again of what the node holds.
        wait_until(lambda: cluster(agent)["announced"] == 1)


def test_static_peers_need_no_tracker(tmp_path: Path, secret: Path, files: dict[str, bytes]) -> None:
    model = write_files(tmp_path / "model", published(files))
    with node(tmp_path, "a", secret) as first:
        assert sources(first, model)["origin"] > 0
        address = cluster(first)["me"]["address"]
        with node(tmp_path, "b", secret, peers={"static": [address]}) as second:
            assert sources(second, model) == {"origin": 0, "peer": sum(map(len, files.values())), "local": 0}
