"""The agent's settings: what a file and the environment say, and every wrong value as one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.command import Command

from headrace.cache.errors import UsageError
from headrace.prefetch import settings
from headrace.prefetch.settings import SECTIONS, variable

CHECKOUT = Path(__file__).resolve().parents[2]
WHERE = "/etc/headrace/agent.toml"


def parsed(text: str = "", **environ: str) -> settings.AgentSettings:
    return settings.parse(text, WHERE, {"HEADRACE_ROOT": "/srv/models", **environ})


def test_nothing_said_is_a_node_of_its_own() -> None:
    found = parsed()
    assert found.socket == "/run/headrace/agent.sock"
    assert str(found.root) == "/srv/models"
    assert found.peers["listen"] == ""
    assert found.name


def test_every_key_can_be_said_in_the_file() -> None:
    found = parsed(
        """
        domain = "tenant"
        [agent]
        socket = "/a.sock"
        prestage_jobs = 5
        drain = "2m"
        [node]
        name = "n1"
        zone = "z"
        address = "n1.example:7700"
        [peers]
        listen = "0.0.0.0:7700"
        secrets = {default = "/etc/secret"}
        static = ["n2:7700", "[fd00::2]:7700"]
        slots = 3
        [bandwidth]
        origin = "800Mbit/s"
        held_back = 0
        [bandwidth.prestage]
        origin = "10MB/s"
        disk = "1GiB/s"
        """
    )
    assert (found.socket, found.prestage_jobs, found.drain) == ("/a.sock", 5, 120.0)
    assert (found.name, found.zone, found.address) == ("n1", "z", "n1.example:7700")
    assert found.peers["static"] == ("n2:7700", "[fd00::2]:7700")
    assert found.bandwidth.total.origin == 100_000_000
    assert found.bandwidth.prestage.origin == 10_000_000
    assert found.bandwidth.prestage.disk == 1 << 30
    assert found.bandwidth.held_back == 0
    assert found.config.domain == "tenant"


def test_the_environment_counts_more_than_the_file() -> None:
    found = parsed(
        "[node]\nzone = 'a'\n[peers]\nslots = 3",
        HEADRACE_AGENT_NODE_ZONE="b",
        HEADRACE_AGENT_PEERS_SLOTS="9",
        HEADRACE_AGENT_PEERS_LISTEN="127.0.0.1:0",
        HEADRACE_AGENT_PEERS_SECRETS="default=/s1, tenant=/s2",
        HEADRACE_AGENT_PEERS_STATIC="n2:1,n3:2",
        HEADRACE_AGENT_BANDWIDTH_PRESTAGE_PEERS="1Gbit/s",
        HEADRACE_AGENT_LOG_LEVEL="debug",
        HEADRACE_AGENT_DRAIN="2.5",
    )
    assert (found.zone, found.peers["slots"], found.log_level) == ("b", 9, "debug")
    assert found.peers["secrets"] == {"default": "/s1", "tenant": "/s2"}
    assert found.peers["static"] == ("n2:1", "n3:2")
    assert found.bandwidth.prestage.peers == 125_000_000
    assert found.drain == 2.5


WRONG: list[tuple[str, str]] = [
    ("[agent]\nsocke = '/x'", "'socke' in [agent]"),
    ("[agent]\nsocket = 'x'", "'socket' in [agent] has to be an absolute path"),
    ("[agent]\nsocket = 3", "'socket' in [agent]"),
    ("[agent]\nmetrics = 'localhost'", "'metrics' in [agent]"),
    ("[agent]\nmetrics = 'localhost:99999'", "'metrics' in [agent]"),
    ("[agent]\nmetrics = 'fd00::1:80'", "'metrics' in [agent]"),
    ("[agent]\nlog_level = 'loud'", "debug, info, warning, error"),
    ("[agent]\nprestage_jobs = 0", "'prestage_jobs' in [agent]"),
    ("[agent]\nprestage_jobs = true", "'prestage_jobs' in [agent]"),
    ("[agent]\nprestage_jobs = '2'", "'prestage_jobs' in [agent]"),
    ("[agent]\ndrain = -1", "'drain' in [agent]"),
    ("[agent]\ndrain = '5 days'", "'drain' in [agent]"),
    ("agent = 3", "write [agent]"),
    ('[node]\nname = "a\\nb"', "'name' in [node]"),
    ("[node]\naddress = ':7700'", "'address' in [node]"),
    ("[peers]\nslots = 0", "'slots' in [peers]"),
    ("[peers]\nstatic = 'n1:7700'", "'static' in [peers]"),
    ("[peers]\nsecrets = '/etc/secret'", "'secrets' in [peers]"),
    ("[peers]\nsecrets = {default = 'secret'}", "'secrets' in [peers]"),
    ("[peers]\nca = '/ca'", "mutual TLS in [peers]"),
    ("[peers]\nlisten = '0.0.0.0:7700'", "'address' in [node]"),
    ("[tracker]\nurl = 'redis://r:6379'", "without 'listen' in [peers]"),
    ("[peers]\nlisten = '127.0.0.1:0'\n[tracker]\nurl = 'http://r'", "in [tracker], the tracker's url"),
    ("[peers]\nlisten = '127.0.0.1:0'\n[tracker]\nurl = 'redis://:geheim@r'", "carries a user or password"),
    ("[tracker]\nlease = 'long'", "'lease' in [tracker]"),
    ("[bandwidth]\norigin = '800Mbit'", "'origin' in [bandwidth]"),
    ("[bandwidth]\norigin = -5", "'origin' in [bandwidth]"),
    ("[bandwidth]\nprestage = 3", "write [bandwidth.prestage]"),
    ("[bandwidth.prestage]\nheld_back = 3", "'held_back' in [bandwidth.prestage]"),
    ("[bandwidth.urgent]\norigin = 3", "'urgent' in [bandwidth]"),
    ("[[peers]]\nslots = 3", "write [peers]"),
    ("wrong = 1", "'wrong'"),
    ("[agent", "cannot be read"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_said_with_its_file_and_key(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(text)
    message = str(caught.value)
    assert message.startswith(WHERE) or repr(WHERE) in message
    assert said in message
    assert message.endswith(".")
    assert "geheim" not in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HEADRACE_AGENT_SOCKE", "/x", "$HEADRACE_AGENT_SOCKE:"),
        ("HEADRACE_AGENT_SOCKET", "x", "$HEADRACE_AGENT_SOCKET has to be an absolute path"),
        ("HEADRACE_AGENT_PEERS_SLOTS", "many", "$HEADRACE_AGENT_PEERS_SLOTS has to be"),
        ("HEADRACE_AGENT_PEERS_SECRETS", "default", "$HEADRACE_AGENT_PEERS_SECRETS has to be"),
        ("HEADRACE_AGENT_BANDWIDTH_ORIGIN", "fast", "$HEADRACE_AGENT_BANDWIDTH_ORIGIN has to be"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parsed(**{name: value})


def test_check_prints_what_is_in_effect_and_no_secret(headrace: Command, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-secret-that-nobody-may-see\n")
    config = tmp_path / "agent.toml"
    config.write_text(f"[peers]\nlisten = '127.0.0.1:0'\nsecrets = {{default = '{secret}'}}\n")
    shown = headrace("agent", "--config", config, "--check", "--json").json
    assert shown["peers"]["secrets"] == {"default": str(secret)}
    assert shown["root"] == str(headrace.root)
    text = headrace("agent", "--config", config, "--check").out
    assert "nobody-may-see" not in text
    # What is printed can be read again.
    config.write_text(text)
    assert headrace("agent", "--config", config, "--check").out == text


def test_check_says_what_is_wrong(headrace: Command, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text("[agent]\nsocket = 'here'\n")
    assert "'socket' in [agent]" in headrace("agent", "--config", config, "--check", code=2).err
    config.write_text("[peers]\nlisten = '127.0.0.1:0'\nsecrets = {default = '/none'}\n")
    assert "/none" in headrace("agent", "--config", config, "--check", code=55).err
    assert "cannot be read" in headrace("agent", "--config", tmp_path / "none.toml", "--check", code=2).err


def test_the_example_is_right_and_names_every_key() -> None:
    text = (CHECKOUT / "deploy" / "agent.toml").read_text()
    parsed(text)
    # What is commented out is as right as what is not.
    uncommented = re.sub(r"^#(?=[a-z_\[])", "", text, flags=re.MULTILINE)
    settings.parse(uncommented, "deploy/agent.toml", {})
    for section, keys in SECTIONS.items():
        body = uncommented.partition(f"[{section}]")[2].partition("\n[")[0]
        assert [key for key in keys if not re.search(rf"^{key} = ", body, re.MULTILINE)] == [], section


def test_the_page_names_every_key_its_variable_and_its_default() -> None:
    text = (CHECKOUT / "docs" / "agent.md").read_text()
    for section, keys in SECTIONS.items():
        if keys:
            assert f"### `[{section}]`" in text
        body = text.partition(f"### `[{section}]`")[2].partition("\n#")[0]
        rows: dict[str, str] = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", body, re.MULTILINE))
        assert set(rows) == set(keys), section
        for key, row in rows.items():
            assert f"`{variable(section, key)}`" in row
            assert f"`{default(keys[key].default)}`" in row


def default(value: Any) -> str:
    """As the page writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)
