"""An agent's life: started, stopped, reloaded, killed, followed by the next one."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

from support.agents import RunningAgent
from support.command import Command, wait_until
from support.faulty_server import FaultyServer
from support.models import below
from support.stores import read_files

from headrace.cache.inventory import entry
from headrace.cache.store import Store

CHUNK = str(64 * 1024)


def present(root: Path) -> int:
    with Store.open(root, writable=False) as store:
        domain = store.domain()
        return sum(entry(domain, snapshot).present for snapshot in domain.snapshots())


def stage(server: FaultyServer) -> tuple[str, ...]:
    return ("stage", f"{server.url}/m/", "--chunk-size", CHUNK, "--connections", "4", "--json")


def test_sigterm_gives_back_claims_and_the_clients_go_on_by_themselves(
    agent: RunningAgent, slow: FaultyServer, files: dict[str, bytes]
) -> None:
    with agent.commands().start(*stage(slow)) as client:
        wait_until(lambda: present(agent.command.root) > 500_000)
        assert agent.stop() == 0
        slow.pace = None
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    assert "the agent has gone" in err
    report = json.loads(out)["snapshots"][0]
    # What the agent had brought was not fetched again: both together fetched each byte once.
    assert sum(report["sources"].values()) == report["bytes"]
    assert read_files(Path(report["path"])) == files
    assert not os.path.exists(agent.socket)
    assert "Traceback" not in agent.log()


def test_kill_9_at_any_time_and_the_next_agent_resumes(
    agent: RunningAgent, slow: FaultyServer, files: dict[str, bytes]
) -> None:
    answer = agent.client.ask(
        "POST", "/v1/stage", {"request": {"reference": f"{slow.url}/m", "chunk": int(CHUNK)}, "wait": False}
    )
    assert answer["state"] == "running"
    wait_until(lambda: present(agent.command.root) > 500_000)
    agent.kill()
    kept = present(agent.command.root)
    slow.pace = None
    with agent:
        report = agent.commands()(*stage(slow)).json["snapshots"][0]
    assert sum(report["sources"].values()) == report["bytes"] - kept
    assert read_files(Path(report["path"])) == files


def test_a_staging_process_that_dies_is_started_again(
    agent: RunningAgent, slow: FaultyServer, files: dict[str, bytes]
) -> None:
    with agent.commands().start(*stage(slow)) as client:
        wait_until(lambda: present(agent.command.root) > 500_000)
        (staging,) = agent.children()
        os.kill(staging, signal.SIGKILL)
        slow.pace = None
        out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    report = json.loads(out)["snapshots"][0]
    assert read_files(Path(report["path"])) == files
    assert agent.client.ask("GET", "/v1/jobs")["jobs"][0]["restarts"] == 1
    assert "by signal 9" in agent.log()


def test_a_staging_process_that_dies_again_and_again_is_a_clear_error(
    agent: RunningAgent, files: dict[str, bytes]
) -> None:
    crawling = FaultyServer(below("m", files), rate=1e4)
    with crawling, agent.commands().start(*stage(crawling)) as client:
        killed: set[int] = set()
        while client.poll() is None:
            for pid in set(agent.children()) - killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        out, err = client.communicate()
    assert client.returncode == 60, err
    assert "4 times in a row" in json.loads(out)["error"]["message"]
    assert len(killed) == 4


def test_the_second_agent_of_a_store_waits_and_then_says_who_is_there(
    agent: RunningAgent, tmp_path: Path
) -> None:
    second = RunningAgent(agent.command, tmp_path / "second", {"agent": {"lock_wait": 0.3}})
    second.start(wait=False)
    assert second.ended() == 36
    assert f"the agent with process id {agent.pid} works on the store" in second.log()
    second.configure({"agent": {"lock_wait": "30s"}})
    with second.start(wait=False):
        wait_until(lambda: "waiting for the agent" in second.log())
        assert agent.stop() == 0
        second.wait_ready()
        assert second.client.ask("GET", "/v1/agent")["pid"] == second.pid


def test_two_agents_do_not_share_a_socket(agent: RunningAgent, headrace: Command, tmp_path: Path) -> None:
    other = Command(headrace.home, tmp_path / "other-store", headrace.environ)
    second = RunningAgent(other, tmp_path / "second", {"agent": {"socket": agent.socket}})
    second.start(wait=False)
    assert second.ended() == 60
    assert "another agent answers" in second.log()
    assert agent.client.ask("GET", "/v1/agent")["pid"] == agent.pid


def test_sighup_takes_over_what_is_right_and_keeps_the_old_when_it_is_not(
    agent: RunningAgent, slow: FaultyServer
) -> None:
    with agent.commands().start(*stage(slow)) as client:
        wait_until(lambda: present(agent.command.root) > 200_000)
        agent.configure({"agent": {"prestage_jobs": "many"}})
        agent.signal(signal.SIGHUP)
        wait_until(lambda: "the old ones stay" in agent.log())
        assert "'prestage_jobs' in [agent]" in agent.log()
        agent.configure({"agent": {"prestage_jobs": 7, "volumes": "/elsewhere"}})
        agent.signal(signal.SIGHUP)
        wait_until(lambda: "settings were read again" in agent.log())
        assert "agent.volumes will change with the next start" in agent.log()
        slow.pace = None
        # What was under way was not cut off.
        _, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    assert "the agent has gone" not in err
    assert agent.client.ask("GET", "/v1/jobs")["jobs"][0]["restarts"] == 0


def test_systemd_is_told(headrace: Command, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(30)

        def told() -> list[str]:
            return systemd.recv(4096).decode().splitlines()

        agent = RunningAgent(headrace, tmp_path / "agent", environ={"NOTIFY_SOCKET": str(address)})
        with agent:
            assert "READY=1" in told()
            agent.signal(signal.SIGHUP)
            first, second = told()
            assert first == "RELOADING=1"
            assert second.startswith("MONOTONIC_USEC=")
            assert "READY=1" in told()
            assert agent.stop() == 0
            assert "STOPPING=1" in told()


def test_what_cannot_start_says_why(headrace: Command, tmp_path: Path) -> None:
    long = RunningAgent(headrace, tmp_path / "long", {"agent": {"socket": f"/tmp/{'x' * 120}"}})
    long.start(wait=False)
    assert long.ended() == 60
    assert "more than 107 bytes" in long.log()
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        busy = RunningAgent(headrace, tmp_path / "busy", {"agent": {"metrics": address}})
        busy.start(wait=False)
        assert busy.ended() == 60
        assert address in busy.log()
    open_to_all = RunningAgent(
        headrace, tmp_path / "open", {"peers": {"listen": "0.0.0.0:0"}, "node": {"address": "n:1"}}
    )
    open_to_all.start(wait=False)
    assert open_to_all.ended() == 55
    assert "without a secret" in open_to_all.log()
    assert not any("Traceback" in one.log() for one in (long, busy, open_to_all))
