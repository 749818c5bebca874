"""The administrator's socket: what it does, who may use it, and how it says what is wrong."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.agents import RunningAgent
from support.command import wait_until
from support.faulty_server import FaultyServer
from support.models import below
from support.mounts import needs_root

from headrace.cache.errors import AgentUnavailable, HeadraceError, Held, NotFound, NotStaged, UsageError
from headrace.prefetch.client import AgentClient, Unsuited


def staged(agent: RunningAgent, reference: object, **more: Any) -> dict[str, Any]:
    """Stage through the socket; the report."""
    lines = list(agent.client.stream("POST", "/v1/stage", {"request": {"reference": str(reference)}, **more}))
    found: dict[str, Any] = lines[-1]["report"]
    return found


def test_the_socket_is_its_owners_alone(lasting: RunningAgent) -> None:
    status = os.stat(lasting.socket)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


@needs_root
def test_another_user_is_not_let_in(lasting: RunningAgent) -> None:
    program = (
        "import socket, sys, os; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "sys.exit(s.connect_ex(sys.argv[1]))"
    )
    for folder in (lasting.folder, *lasting.folder.parents):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o111)
    done = subprocess.run([sys.executable, "-c", program, lasting.socket], check=False, timeout=60)
    assert done.returncode == 13  # EACCES


def test_what_is_staged_is_listed_pinned_verified_and_removed(agent: RunningAgent, model: Path) -> None:
    ask = agent.client.ask
    report = staged(agent, model)
    name = report["snapshot"][:12]
    (listed,) = ask("GET", "/v1/snapshots")["snapshots"]
    assert (listed["snapshot"], listed["staged"]) == (report["snapshot"], True)
    assert ask("GET", "/v1/snapshot", name=str(model))["snapshot"] == report["snapshot"]
    assert ask("POST", "/v1/pin", {"name": name, "reason": "a test"})["pinned"] == "a test"
    with pytest.raises(Held, match="a test"):
        ask("POST", "/v1/remove", {"name": name})
    assert ask("POST", "/v1/unpin", {"name": name})["pinned"] is None
    *_, last = agent.client.stream("POST", "/v1/verify", {"name": name})
    assert last["report"]["ok"]
    assert last["report"]["bytes"] == report["bytes"]
    assert ask("POST", "/v1/remove", {"name": name})["removed"]["id"] == report["snapshot"]
    assert ask("GET", "/v1/snapshots")["snapshots"] == []


def test_clients_of_one_reference_share_one_job(
    agent: RunningAgent, slow: FaultyServer, files: dict[str, bytes]
) -> None:
    reports: list[dict[str, Any]] = []

    def client() -> None:
        reports.append(staged(agent, f"{slow.url}/m"))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: [job["clients"] for job in agent.client.ask("GET", "/v1/jobs")["jobs"]] == [4])
    wait_until(lambda: len(agent.children()) == 1)
    slow.pace = None
    for thread in threads:
        thread.join(60)
    assert len(reports) == 4
    assert len({report["snapshot"] for report in reports}) == 1
    assert sum(report["sources"]["origin"] for report in reports[:1]) <= sum(map(len, files.values()))
    assert all(report == reports[0] for report in reports)


def test_a_job_ends_with_the_last_client_that_waits(agent: RunningAgent, slow: FaultyServer) -> None:
    asked = {"request": {"reference": f"{slow.url}/m"}}
    first = agent.client.stream("POST", "/v1/stage", asked)
    second = agent.client.stream("POST", "/v1/stage", asked)

    def job() -> dict[str, Any]:
        found: dict[str, Any] = agent.client.ask("GET", "/v1/jobs")["jobs"][0]
        return found

    wait_until(lambda: job()["clients"] == 2)
    first.close()
    wait_until(lambda: job()["clients"] == 1)
    assert job()["state"] == "running"
    second.close()
    wait_until(lambda: job()["state"] == "cancelled")
    wait_until(lambda: agent.children() == [])


def test_what_was_asked_for_without_waiting_goes_on(agent: RunningAgent, slow: FaultyServer) -> None:
    job = agent.client.ask(
        "POST", "/v1/stage", {"request": {"reference": f"{slow.url}/m"}, "wait": False, "class": "prestage"}
    )
    assert (job["class"], job["kept"]) == ("prestage", True)
    follower = agent.client.stream("GET", f"/v1/jobs/{job['job']}/progress")
    said = next(iter(follower))
    assert said["job"] == job["job"]
    follower.close()
    slow.pace = None
    wait_until(lambda: agent.client.ask("GET", f"/v1/jobs/{job['job']}")["state"] == "staged")


def test_pre_staging_waits_its_turn_until_a_pod_needs_it(
    agent: RunningAgent, files: dict[str, bytes]
) -> None:
    def ask(reference: str, of: str) -> None:
        agent.client.ask(
            "POST", "/v1/stage", {"request": {"reference": reference}, "wait": False, "class": of}
        )

    def states() -> dict[str, str]:
        return {job["reference"]: job["state"] for job in agent.client.ask("GET", "/v1/jobs")["jobs"]}

    models = {path: data for name in "abc" for path, data in below(name, files).items()}
    with FaultyServer(models, rate=1e4) as server:
        references = [f"{server.url}/{name}" for name in "abc"]
        for reference in references:
            ask(reference, "prestage")
        assert list(states().values()) == ["running", "running", "waiting"]
        ask(references[2], "demand")
        assert states()[references[2]] == "running"
        for job in agent.client.ask("GET", "/v1/jobs")["jobs"]:
            agent.client.ask("DELETE", f"/v1/jobs/{job['job']}")
    assert set(states().values()) == {"cancelled"}
    assert agent.children() == []


def test_a_failure_reaches_every_client_as_the_same_error(lasting: RunningAgent, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lines = list(
        lasting.client.stream("POST", "/v1/stage", {"request": {"reference": str(tmp_path / "none")}})
    )
    assert lines[-1]["error"]["kind"] == "NotFound"
    assert lines[-1]["error"]["exit_code"] == NotFound.exit_code


WRONG: list[tuple[str, str, Any, type[Exception], str]] = [
    ("POST", "/v1/stage", {}, UsageError, "with a reference"),
    ("POST", "/v1/stage", {"request": {"reference": 3}}, UsageError, "'reference'"),
    ("POST", "/v1/stage", {"request": {"reference": ""}}, UsageError, "not a model reference"),
    ("POST", "/v1/stage", {"request": {"reference": "/m", "workers": "2"}}, UsageError, "'workers'"),
    ("POST", "/v1/stage", {"request": {"reference": "/m", "keys": [3]}}, UsageError, "'keys'"),
    ("POST", "/v1/stage", {"request": {"reference": "/m", "limits": {"span": -1}}}, UsageError, "limits"),
    ("POST", "/v1/stage", {"request": {"reference": "/m", "haste": 1}}, Unsuited, "'haste'"),
    ("POST", "/v1/stage", {"request": {"reference": "/m"}, "class": "now"}, UsageError, "demand or prestage"),
    (
        "POST",
        "/v1/stage",
        {"request": {"reference": "/m"}, "origin": {"endpoint": "http://x"}},
        Unsuited,
        "endpoint",
    ),
    ("POST", "/v1/pin", {"name": "none"}, NotStaged, "'none'"),
    ("POST", "/v1/pin", {}, UsageError, "'name'"),
    ("POST", "/v1/pin", {"name": "x", "domain": "../up"}, HeadraceError, "../up"),
    ("POST", "/v1/volumes", {"volume": "v", "snapshots": ["none"]}, NotStaged, "'none'"),
    ("POST", "/v1/volumes", {"volume": "v"}, UsageError, "its snapshots"),
    ("GET", "/v1/jobs/7", None, NotFound, "'7'"),
    ("GET", "/v1/explain", None, UsageError, "needs a name"),
    ("GET", "/v2/status", None, UsageError, "/v2/status"),
    ("PUT", "/v1/status", None, UsageError, "PUT /v1/status"),
]


def test_every_wrong_request_is_one_sentence(lasting: RunningAgent) -> None:
    for method, path, values, kind, said in WRONG:
        with pytest.raises(kind) as caught:
            lasting.client.ask(method, path, values)
        assert said in str(caught.value), (method, path, values)
    assert "Traceback" not in lasting.log()


def test_a_body_that_is_no_object_is_refused(lasting: RunningAgent) -> None:
    for raw in (b"[1]", b"{", b"\xff\xfe"):
        with lasting.raw("POST", "/v1/pin", raw) as answer:
            assert answer.status == 400
            assert b"has to be a JSON object" in answer.read()
    with lasting.raw("POST", "/v1/pin", b"x" * (2 << 20)) as answer:
        assert answer.status == 413


def test_nobody_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match=r"none\.sock"):
        AgentClient(str(tmp_path / "none.sock")).ask("GET", "/v1/status")


def test_explain_says_why(lasting: RunningAgent, model: Path) -> None:
    staged(lasting, model)
    found = lasting.client.ask("GET", "/v1/explain", name=str(model))
    assert found["snapshot"]["staged"]
    assert found["jobs"][0]["state"] == "staged"
    assert any("all of it is in this node's store" in sentence for sentence in found["why"])
    with pytest.raises(NotStaged):
        lasting.client.ask("GET", "/v1/explain", name="s3://never/asked")
