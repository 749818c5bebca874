"""The agent's settings: one frozen object from a TOML file and environment variables.

The file is headrace's configuration file (`headrace.cache.config`) with more sections; both may stand in
one. Every key has an environment variable, which counts more than the file: `HEADRACE_AGENT_SOCKET` for
`socket` in `[agent]`, `HEADRACE_AGENT_NODE_ZONE` for `zone` in `[node]`, and so on. Secrets are in files
that the settings name, never in the settings.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.cache import config
from headrace.cache.config import Config
from headrace.cache.errors import UsageError
from headrace.cache.peers.security import SecurityFiles
from headrace.cache.store import default_root
from headrace.cache.tracker.settings import TrackerSettings
from headrace.prefetch.keys import (
    ADDRESS,
    ADDRESSES,
    FILES,
    PATH,
    RATE,
    SECONDS,
    TEXT,
    Key,
    choice,
    whole,
)

DEFAULT_SOCKET = "/run/headrace/agent.sock"
PREFIX = "HEADRACE_AGENT_"
_FIXED_PEERS = ("listen", "slots", "static", "heartbeat")
_CHANGEABLE = ("log_level", "prestage_jobs", "lock_wait", "drain")

_RATES = {
    "origin": Key(RATE, 0, "what is read from origins"),
    "peers": Key(RATE, 0, "what is read from other nodes"),
    "disk": Key(RATE, 0, "what is written into the store"),
    "uploads": Key(RATE, 0, "what other nodes read from this one"),
}

SECTIONS: Mapping[str, Mapping[str, Key]] = {
    "agent": {
        "socket": Key(PATH, DEFAULT_SOCKET, "the administrator's socket, for the agent's own user alone"),
        "volumes": Key(
            PATH, "/run/headrace/volumes", "the folder with one folder and socket for each volume"
        ),
        "metrics": Key(ADDRESS, "127.0.0.1:9464", 'where /metrics, /healthz and /readyz are; "" for nowhere'),
        "log_level": Key(choice("debug", "info", "warning", "error"), "info", "what is logged, at least"),
        "prestage_jobs": Key(whole(1), 2, "how many models are pre-staged at once; the others wait"),
        "lock_wait": Key(SECONDS, 60.0, "how long to wait for another agent to leave the store"),
        "drain": Key(SECONDS, 20.0, "how long uploads may take to end when the agent stops"),
    },
    "node": {
        "name": Key(TEXT, "", "in logs and metrics; by default the host's name"),
        "zone": Key(TEXT, "", "nodes of one zone are near each other"),
        "address": Key(ADDRESS, "", "where other nodes reach this one; by default where it listens"),
    },
    "tracker": {
        "url": Key(TEXT, "", 'the Redis or Valkey that nodes share: "redis://host:6379/0"; "" for none'),
        "user": Key(TEXT, "", "of its access list"),
        "password_file": Key(PATH, "", "a file with its password; else `$HEADRACE_REDIS_PASSWORD`"),
        "sentinel_user": Key(TEXT, "", "of Sentinel itself"),
        "sentinel_password_file": Key(
            PATH, "", "with Sentinel's password; else `$HEADRACE_SENTINEL_PASSWORD`"
        ),
        "prefix": Key(TEXT, "headrace", "of all keys: clusters with different ones do not see each other"),
        "ca": Key(PATH, "", "certificates that the server's is checked with (PEM)"),
        "certificate": Key(PATH, "", "this node's, for a server that asks for one (PEM)"),
        "key": Key(PATH, "", "its private key (PEM)"),
        "lease": Key(SECONDS, 10.0, "how long a claim to read from the origin holds unless it is kept"),
        "lifetime": Key(SECONDS, 3600.0, "how long keys stay that no node renews"),
        "timeout": Key(SECONDS, 2.0, "for one call"),
    },
    "peers": {
        "listen": Key(ADDRESS, "", 'where this node serves others; "": it does not, and reads from none'),
        "secrets": Key(FILES, {}, "a file for each trust domain: a secret on each line, the first signs"),
        "ca": Key(PATH, "", "mutual TLS: the authority's certificates (PEM)"),
        "certificate": Key(PATH, "", "mutual TLS: this node's certificate (PEM)"),
        "key": Key(PATH, "", "mutual TLS: its private key (PEM)"),
        "static": Key(ADDRESSES, (), "other nodes, where no tracker tells of them"),
        "heartbeat": Key(
            SECONDS, 5.0, "how often it says that it lives; after three times that it is taken for gone"
        ),
        "slots": Key(whole(1, 4096), 8, "uploads at once; who comes next is told to ask elsewhere"),
    },
    "bandwidth": {
        **_RATES,
        "held_back": Key(RATE, 1_000_000, "what all pre-staging together gets while a pod waits"),
    },
    "bandwidth.demand": _RATES,
    "bandwidth.prestage": _RATES,
}
"""Every key of every section."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second; 0: no limit."""

    origin: int = 0
    peers: int = 0
    disk: int = 0
    uploads: int = 0


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Rates of the whole node, and of each class within it.

    Attributes:
        held_back: of all pre-staging together, for each kind, while a demanded job runs.
    """

    total: Rates = field(default_factory=Rates)
    demand: Rates = field(default_factory=Rates)
    prestage: Rates = field(default_factory=Rates)
    held_back: int = 1_000_000


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything the agent is told; section by section as in `SECTIONS`.

    Attributes:
        config: what is not the agent's alone: store, trust domain, origins.
        text, where: the file it came from; its text may hold a proxy's password.
    """

    config: Config
    text: str = field(repr=False)
    where: str
    root: Path
    socket: str
    volumes: str
    metrics: str
    log_level: str
    prestage_jobs: int
    lock_wait: float
    drain: float
    name: str
    zone: str
    address: str
    tracker: TrackerSettings | None
    peers: Mapping[str, Any]
    bandwidth: Bandwidth


def load(path: str | None = None, environ: Mapping[str, str] | None = None) -> AgentSettings:
    """Read the settings: of `path`, else of headrace's configuration file, if there is one.

    Raises:
        UsageError: names the file, or the variable, and the key that is wrong.
    """
    environ = os.environ if environ is None else environ
    named = path or environ.get("HEADRACE_CONFIG")
    file = Path(named) if named else config.SYSTEM
    text = config.read(file) if named or file.exists() else ""
    return parse(text, str(file), environ)


def parse(text: str, where: str, environ: Mapping[str, str]) -> AgentSettings:
    """The settings that a file's text and the environment make. Raises UsageError."""
    plain = config.parse(text, where, environ)
    given = _flattened(config.values_of(text, where), where)
    read = {
        name: _section(name, keys, given.get(name, {}), where, environ) for name, keys in SECTIONS.items()
    }
    _check_variables(environ)
    agent, node, peers = read["agent"], read["node"], read["peers"]
    _check_peers(node, peers, where)
    rates = read["bandwidth"]
    held_back = rates.pop("held_back")
    bandwidth = Bandwidth(
        Rates(**rates), Rates(**read["bandwidth.demand"]), Rates(**read["bandwidth.prestage"]), held_back
    )
    return AgentSettings(
        config=plain,
        text=text,
        where=where,
        root=Path(os.path.abspath(plain.root or default_root(environ))),
        **agent,
        **{**node, "name": node["name"] or socket.gethostname()},
        tracker=_tracker(read["tracker"], peers, where),
        peers=peers,
        bandwidth=bandwidth,
    )


def variable(section: str, key: str) -> str:
    """The environment variable of a key."""
    middle = "" if section == "agent" else f"{section.replace('.', '_')}_"
    return f"{PREFIX}{middle}{key}".upper()


def effective(settings: AgentSettings) -> dict[str, Any]:
    """The settings in effect, by section, for `headrace agent --check`."""
    bandwidth = settings.bandwidth
    found: dict[str, Any] = {
        "root": str(settings.root),
        "domain": settings.config.domain,
        "revalidate": settings.config.revalidate,
        "workers": settings.config.workers,
        "origins": [rule.prefix for rule in settings.config.origins],
    }
    for section in ("agent", "node"):
        found[section] = {key: getattr(settings, key) for key in SECTIONS[section]}
    tracker = settings.tracker.as_json() if settings.tracker else {}
    found["tracker"] = {key: tracker.get(key) or of.default for key, of in SECTIONS["tracker"].items()}
    found["peers"] = dict(settings.peers)
    found["bandwidth"] = {**_rates(bandwidth.total), "held_back": _shown(bandwidth.held_back)}
    found["bandwidth.demand"] = _rates(bandwidth.demand)
    found["bandwidth.prestage"] = _rates(bandwidth.prestage)
    return found


def _rates(rates: Rates) -> dict[str, int | str]:
    return {key: _shown(getattr(rates, key)) for key in _RATES}


def _shown(rate: int) -> int | str:
    return f"{rate}B/s" if rate else 0


def _flattened(values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The agent's sections, `[bandwidth.demand]` under that name."""
    found: dict[str, dict[str, Any]] = {}
    for section in config.AGENT_SECTIONS:
        given = values.get(section, {})
        if not isinstance(given, dict):
            raise UsageError(f"{where}: {section!r} has to be a section: write [{section}].")
        inner = [key for key in given if f"{section}.{key}" in SECTIONS]
        for key in inner:
            if not isinstance(given[key], dict):
                raise UsageError(f"{where}: {section}.{key} has to be a section: write [{section}.{key}].")
            found[f"{section}.{key}"] = given[key]
        found[section] = {key: value for key, value in given.items() if key not in inner}
    return found


def _section(
    section: str, keys: Mapping[str, Key], given: Mapping[str, Any], where: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    if unknown := [key for key in given if key not in keys]:
        raise UsageError(
            f"{where}: there is no setting {unknown[0]!r} in [{section}]; known are {', '.join(keys)}."
        )
    found = {}
    for name, key in keys.items():
        found[name] = key.default
        if name in given:
            found[name] = _value(key, given[name], f"{where}: {name!r} in [{section}]", given[name])
        if (text := environ.get(variable(section, name))) is not None:
            found[name] = _value(key, key.kind.parse(text), f"${variable(section, name)}", text)
    return found


def _value(key: Key, value: Any, where: str, shown: Any) -> Any:
    try:
        return key.kind.read(value)
    except ValueError as error:
        raise UsageError(f"{where} has to be {error}, not {shown!r}.") from None


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {variable(section, key) for section, keys in SECTIONS.items() for key in keys}
    if unknown := sorted(name for name in environ if name.startswith(PREFIX) and name not in known):
        raise UsageError(f"there is no setting ${unknown[0]}: docs/agent.md lists the agent's variables.")


def _tracker(values: Mapping[str, Any], peers: Mapping[str, Any], where: str) -> TrackerSettings | None:
    if not values["url"]:
        return None
    if not peers["listen"]:
        raise UsageError(
            f"{where}: [tracker] is of no use without 'listen' in [peers]: say where others reach this node."
        )
    try:
        return TrackerSettings.from_json({key: value for key, value in values.items() if value != ""})
    except UsageError as error:
        raise UsageError(f"{where}: in [tracker], {error}") from None


def _check_peers(node: Mapping[str, Any], peers: Mapping[str, Any], where: str) -> None:
    tls = [key for key in ("ca", "certificate", "key") if peers[key]]
    if tls and len(tls) < 3:
        raise UsageError(
            f"{where}: mutual TLS in [peers] needs ca, certificate and key; only {tls[0]!r} is there."
        )
    if not peers["listen"]:
        return
    host = peers["listen"].rpartition(":")[0]
    if host in ("0.0.0.0", "[::]") and not node["address"]:
        raise UsageError(
            f"{where}: [peers] listens on {peers['listen']!r}, so 'address' in [node] has to say where others "
            "reach this node."
        )


def unchangeable(before: AgentSettings, after: AgentSettings) -> list[str]:
    """Settings that differ and that a running agent cannot change, as "section.key"."""
    found = [] if before.root == after.root else ["root"]
    for section in ("agent", "node"):
        keys = (key for key in SECTIONS[section] if key not in _CHANGEABLE)
        found += [f"{section}.{key}" for key in keys if getattr(before, key) != getattr(after, key)]
    found += ["tracker"] if before.tracker != after.tracker else []
    found += [f"peers.{key}" for key in _FIXED_PEERS if before.peers[key] != after.peers[key]]
    return found


def check_files(settings: AgentSettings) -> None:
    """Read the secrets and certificates that the settings name.

    Raises:
        NotAuthenticated: one is missing, unreadable or wrong, or none is there and others could connect.
        UsageError: the tracker's password file cannot be read.
    """
    security = security_files(settings).load()
    if settings.tracker is not None:
        settings.tracker.password()
        settings.tracker.sentinel_password()
    if settings.peers["listen"]:
        security.check_listen(settings.peers["listen"].rpartition(":")[0])


def security_files(settings: AgentSettings) -> SecurityFiles:
    """Where the settings say that secrets and certificates are."""
    peers = settings.peers
    return SecurityFiles(
        peers["secrets"], peers["ca"] or None, peers["certificate"] or None, peers["key"] or None
    )
