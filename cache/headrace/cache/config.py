"""The configuration file, and the environment variables that stand for its values.

TOML, at `$HEADRACE_CONFIG`, else `/etc/headrace/config.toml`; every key is optional::

    root = "/var/lib/headrace"
    domain = "default"
    revalidate = "always"            # always | never | an age such as "30s", "10m", "2h", "7d"
    workers = 0                      # 0: by the number of cores

    [[origin]]
    prefix = "s3://prod-models/"     # the longest prefix that fits a reference counts
    require = "signed"               # published | signed
    keys = ["<64 hex digits>", "/etc/headrace/publisher.pem"]
    endpoint = "https://minio.example:9000"
    region = "eu-central-1"

The sections of the node's agent (`AGENT_SECTIONS`) may stand in the same file; the agent checks them.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from headrace.cache.errors import UsageError
from headrace.cache.origins.options import OriginOptions
from headrace.cache.reference import Reference
from headrace.cache.resolve import Requirement
from headrace.cache.signature import public_key
from headrace.cache.store import DEFAULT_DOMAIN

SYSTEM = Path("/etc/headrace/config.toml")
AGENT_SECTIONS = ("agent", "node", "tracker", "peers", "bandwidth")
_AGE = re.compile(r"^(\d+)([smhd])$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_OPTIONS = {f.name for f in fields(OriginOptions)} - {"headers"}


@dataclass(frozen=True, slots=True)
class OriginRule:
    """What holds for references that start with `prefix`."""

    prefix: str = ""
    requirement: Requirement = field(default_factory=Requirement)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """The values of one configuration."""

    root: str | None = None
    domain: str = DEFAULT_DOMAIN
    revalidate: str = "always"
    workers: int = 0
    origins: tuple[OriginRule, ...] = ()

    def rule(self, reference: Reference) -> OriginRule:
        """The rule with the longest fitting prefix, or one that asks for nothing."""
        fitting = [r for r in self.origins if f"{reference.uri}/".startswith(r.prefix)]
        return max(fitting, key=lambda r: len(r.prefix), default=OriginRule())

    def options(self, reference: Reference) -> OriginOptions:
        """The environment's options for an origin, with the file's laid over them."""
        base = OriginOptions.from_env(reference.scheme)
        return replace(base, **self.rule(reference).options)


def load(path: str | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration.

    Raises:
        UsageError: the named file is missing or wrong; says which key.
    """
    environ = os.environ if environ is None else environ
    named = path or environ.get("HEADRACE_CONFIG")
    file = Path(named) if named else SYSTEM
    if not named and not file.exists():
        return Config()
    return parse(read(file), str(file), environ)


def read(file: Path) -> str:
    """The text of a configuration file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise UsageError(f"the configuration {str(file)!r} cannot be read: {error}.") from None


def values_of(text: str, where: str) -> dict[str, Any]:
    """What the text of the configuration file `where` says. Raises UsageError."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"the configuration {where!r} cannot be read: {error}.") from None


def parse(text: str, where: str, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration that `text`, from the file `where`, and the environment make.

    Raises:
        UsageError: wrong; says which key.
    """
    environ = os.environ if environ is None else environ
    found = _config(values_of(text, where), where)
    # The environment is nearer to the user than a file that holds for the whole machine.
    return replace(found, root=environ.get("HEADRACE_ROOT") or found.root)


def max_age(revalidate: str) -> float | None:
    """Seconds for which an earlier resolution is believed: 0 for "always", None (for ever) for "never".

    Raises:
        UsageError: neither of them nor an age.
    """
    if revalidate == "always":
        return 0.0
    if revalidate == "never":
        return None
    match = _AGE.match(revalidate)
    if match is None:
        raise UsageError(
            f"revalidate is {revalidate!r}: use always, never, or an age such as 30s, 10m, 2h or 7d."
        )
    return float(int(match[1]) * _SECONDS[match[2]])


def _config(values: dict[str, Any], where: str) -> Config:
    known = {"root": str, "domain": str, "revalidate": str, "workers": int}
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if key == "origin" or key in AGENT_SECTIONS:
            continue
        if key not in known:
            raise UsageError(
                f"{where}: there is no setting {key!r}; known are {', '.join(known)} and [[origin]]."
            )
        if not isinstance(value, known[key]):
            raise UsageError(f"{where}: {key!r} has to be {known[key].__name__}, not {value!r}.")
        plain[key] = value
    max_age(plain.get("revalidate", "always"))
    rules = values.get("origin", [])
    if not isinstance(rules, list):
        raise UsageError(f"{where}: write [[origin]], with two brackets.")
    return Config(**plain, origins=tuple(_rule(r, where) for r in rules))


def _rule(values: dict[str, Any], where: str) -> OriginRule:
    prefix, level = values.get("prefix"), values.get("require")
    if not isinstance(prefix, str):
        raise UsageError(f"{where}: an [[origin]] lacks its prefix.")
    if level not in (None, "published", "signed"):
        raise UsageError(f"{where}: require is {level!r}; it can be 'published' or 'signed'.")
    keys = tuple(public_key(k) for k in values.get("keys", []))
    if level == "signed" and not keys:
        raise UsageError(f"{where}: the origin {prefix!r} requires signatures but names no keys.")
    options = {k: v for k, v in values.items() if k not in ("prefix", "require", "keys")}
    if unknown := sorted(set(options) - _OPTIONS):
        raise UsageError(f"{where}: the origin {prefix!r} has the unknown setting {unknown[0]!r}.")
    return OriginRule(prefix, Requirement(level, keys), options)
