"""Commands through the agent: the same results, errors and exit codes as without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.agents import RunningAgent
from support.command import Command, Result, wait_until
from support.faulty_server import FaultyServer
from support.models import below
from support.stores import read_files

from headrace.loader import load
from headrace.prefetch.client import AgentClient

CHUNK = str(64 * 1024)


def jobs(agent: RunningAgent) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.client.ask("GET", "/v1/jobs")["jobs"]
    return found


def alone(agent: RunningAgent, tmp_path: Path) -> Command:
    """The same user with another store, and without an agent."""
    return Command(agent.command.home, tmp_path / "alone", agent.command.environ)


def report(result: Result) -> dict[str, Any]:
    """Without what differs between two runs."""
    (found,) = result.json["snapshots"]
    assert found.pop("seconds") > 0
    found["path"] = found["path"].partition("/domains/")[2]
    return dict(found)


OPTIONS: list[tuple[str, ...]] = [
    (),
    (),
    ("--chunk-size", CHUNK, "--algorithm", "blake3", "--include", "*00001*", "--ignore", "*.json"),
    ("--domain", "tenant", "--revalidate", "10m", "--workers", "2", "--connections", "2"),
]


def test_staging_through_the_agent_is_staging_alone(
    agent: RunningAgent, model: Path, tmp_path: Path, files: dict[str, bytes]
) -> None:
    through, by_itself = agent.commands(), alone(agent, tmp_path)
    for number, options in enumerate(OPTIONS):
        ours = through("stage", model, *options, "--json")
        assert report(ours) == report(by_itself("stage", model, *options, "--json")), options
        assert len(jobs(agent)) == number + 1
    through("stage", model, tmp_path / "delivered")
    assert read_files(tmp_path / "delivered") == files
    # Who says so stages alone all the same.
    before = len(jobs(agent))
    through("stage", model, "--no-agent")
    assert len(jobs(agent)) == before


def test_whose_store_is_another_one_by_default_is_told_that_the_agent_is_not_asked(
    agent: RunningAgent, model: Path, tmp_path: Path
) -> None:
    before = len(jobs(agent))
    elsewhere = replace(agent.commands(), root=tmp_path / "other")
    said = elsewhere("stage", model).err
    assert f"its store is {agent.command.root}, and here it is {elsewhere.root} (--root)" in said
    assert "not asked" not in elsewhere("stage", model, "--root", tmp_path / "named").err
    assert len(jobs(agent)) == before


def test_errors_and_exit_codes_are_the_same(agent: RunningAgent, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[str | Path, ...], int]] = [
        (("stage", tmp_path / "none"), 11),
        (("stage", "s4://bucket/model"), 2),
        (("stage", tmp_path / "empty"), 11),
        (("stage", tmp_path / "empty", "--revalidate", "soon"), 2),
        (("stage", tmp_path / "empty", "--require", "published"), 21),
    ]
    for args, code in cases:
        ours = agent.commands()(*args, "--json", "--quiet", code=code)
        assert ours.json == alone(agent, tmp_path)(*args, "--json", "--quiet", code=code).json
        assert ours.err.count("\n") == 1


def test_loading_through_the_agent(agent: RunningAgent, slow: FaultyServer, model: Path) -> None:
    ours = agent.commands()("load", f"{slow.url}/m", "--digest", "--json").json
    assert jobs(agent)[0]["state"] == "staged"
    theirs = load(str(model))
    assert ours["digest"] == theirs.digest()
    assert ours["tensors"] == theirs.stats.tensors


def test_a_command_that_is_interrupted_ends_its_job(agent: RunningAgent, slow: FaultyServer) -> None:
    through = agent.commands()

    def moving() -> bool:
        return any(job["progress"]["fetched"]["origin"] > 200_000 for job in jobs(agent))

    stopped = through.interrupted_when(moving, "stage", f"{slow.url}/m", "--chunk-size", CHUNK, "--json")
    assert stopped.code == 130
    assert stopped.json["error"]["exit_code"] == 130
    assert "next run resumes" in stopped.err
    assert "Traceback" not in stopped.err + agent.log()
    wait_until(lambda: jobs(agent)[0]["state"] == "cancelled")
    slow.pace = None
    resumed = through("stage", f"{slow.url}/m", "--chunk-size", CHUNK, "--json").json["snapshots"][0]
    assert sum(resumed["sources"].values()) < resumed["bytes"]


def test_an_agent_that_would_do_something_else_is_not_asked(
    agent: RunningAgent, model: Path, tmp_path: Path
) -> None:
    through = agent.commands()
    through("stage", model, "--root", tmp_path / "elsewhere")
    assert jobs(agent) == []
    config = tmp_path / "mine.toml"
    config.write_text(f'[[origin]]\nprefix = "file://{tmp_path}"\nendpoint = "http://elsewhere"\n')
    mine = Command(through.home, through.root, {**through.environ, "HEADRACE_CONFIG": str(config)})
    assert "the agent is not asked" in mine("stage", model).err
    assert jobs(agent) == []


def test_a_user_who_requires_more_gets_it_from_the_agent(
    agent: RunningAgent, model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(f'[[origin]]\nprefix = "file://{tmp_path}"\nrequire = "published"\n')
    mine = Command(
        agent.command.home,
        agent.command.root,
        {"HEADRACE_SOCKET": agent.socket, "HEADRACE_CONFIG": str(config)},
    )
    error = mine("stage", model, "--json", code=21).json["error"]
    assert error["kind"] == "ManifestError"
    assert jobs(agent)[0]["state"] == "failed"


def test_an_agent_that_is_killed_midway_is_gone_on_without(
    agent: RunningAgent, slow: FaultyServer, files: dict[str, bytes]
) -> None:
    with agent.commands().start("stage", f"{slow.url}/m", "--chunk-size", CHUNK, "--json") as client:
        wait_until(lambda: any(job["progress"]["fetched"]["origin"] > 200_000 for job in jobs(agent)))
        agent.kill()
        slow.pace = None
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    assert "the agent has gone" in err
    assert read_files(Path(json.loads(out)["snapshots"][0]["path"])) == files


@pytest.fixture
def endless(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    """Still gives the model when the last command of a test looks."""
    with FaultyServer(below("m", files), rate=2.5e5) as server:
        yield server


def test_status_shows_what_goes_on(agent: RunningAgent, endless: FaultyServer, model: Path) -> None:
    through = agent.commands()
    through("stage", model)
    agent.client.ask(
        "POST",
        "/v1/stage",
        {"request": {"reference": f"{endless.url}/m"}, "wait": False, "class": "prestage"},
    )
    assert "all of it is in this node's store" in through("explain", model).out
    shown = through("status").out
    assert f"process {agent.pid}" in shown
    assert f"file://{model} (demand): staged" in shown
    assert f"{endless.url}/m (prestage): running" in shown
    status = through("status", "--json").json
    assert [job["state"] for job in status["jobs"]] == ["running", "staged"]
    assert status["store"]["root"] == str(agent.command.root)
    assert (
        through("status", "--socket", "/none.sock", "--json", code=61).json["error"]["kind"]
        == "AgentUnavailable"
    )


def test_a_client_of_another_version_is_understood(agent: RunningAgent, model: Path) -> None:
    """What a neighbouring version does not know it ignores in answers, and refuses in requests."""
    lines = list(
        AgentClient(agent.socket).stream(
            "POST", "/v1/stage", {"request": {"reference": str(model)}, "origin": {"later": 1}, "later": True}
        )
    )
    assert "report" in lines[-1]
