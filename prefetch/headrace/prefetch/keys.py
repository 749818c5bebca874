"""The kinds of values that settings have: how each is read from TOML, and from an environment variable.

Every reader raises ValueError with what the value has to be; who reads adds where it stood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_RATE = re.compile(r"^(\d+(?:\.\d+)?)\s*(|k|M|G|T)(i?)(bit|B)/s$")
_POWER = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}
_SECONDS = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)$")
_LENGTHS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value.

    Attributes:
        name: what a value has to be, in words.
        read: a TOML value as ours.
        parse: the text of an environment variable as a TOML value.
    """

    name: str
    read: Callable[[Any], Any]
    parse: Callable[[str], Any] = str


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its kind, what holds where nobody says, and what it means."""

    kind: Kind
    default: Any
    meaning: str


def whole(least: int, most: int = 1 << 31) -> Kind:
    """A whole number."""
    name = f"a whole number from {least} to {most}" if most < 1 << 31 else f"a whole number, at least {least}"

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(name)
        return value

    return Kind(name, read, lambda text: int(text) if re.fullmatch(r"-?\d+", text) else text)


def choice(*words: str) -> Kind:
    """One of a few words."""
    name = f"one of {', '.join(words)}"

    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(name)
        return str(value)

    return Kind(name, read)


def _text(value: Any) -> str:
    if not isinstance(value, str) or any(ord(c) < 32 for c in value):
        raise ValueError("a text")
    return value


def _path(value: Any) -> str:
    if not isinstance(value, str) or (value and not value.startswith("/")) or "\0" in value:
        raise ValueError("an absolute path")
    return value


def _address(value: Any) -> str:
    if value == "":
        return ""
    if isinstance(value, str):
        host, colon, port = value.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if colon and bare and (":" not in bare or host != bare) and port.isdecimal() and int(port) < 65536:
            return value
    raise ValueError('an address such as "10.0.0.1:7700" or "[fd00::1]:7700"')


def _addresses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of addresses")
    return tuple(_address(one) for one in value)


def _files(value: Any) -> dict[str, str]:
    """A file for each trust domain."""
    if not isinstance(value, Mapping) or not all(
        isinstance(f, str) and f.startswith("/") for f in value.values()
    ):
        raise ValueError("a table of trust domains and the absolute paths of their files")
    return dict(value)


def _files_of_text(text: str) -> dict[str, str]:
    """`domain=/file,other=/file`."""
    parts = (part.strip().partition("=") for part in text.split(",") if part.strip())
    return {name.strip(): file.strip() for name, _, file in parts}


def _rate(value: Any) -> int:
    """Bytes per second; 0: no limit."""
    name = 'a rate such as "800Mbit/s" or "100MB/s", or 0 for none'
    if value == 0 and not isinstance(value, bool):
        return 0
    match = _RATE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(name)
    size = float(match[1]) * (1024 if match[3] else 1000) ** _POWER[match[2]]
    rate = int(size / 8 if match[4] == "bit" else size)
    if rate < 1:
        raise ValueError(name)
    return rate


def _seconds(value: Any) -> float:
    name = 'a number of seconds, or a time such as "10s" or "2m"'
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    match = _SECONDS.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(name)
    return float(match[1]) * _LENGTHS[match[2]]


def _number_of_text(text: str) -> Any:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text


TEXT = Kind("a text", _text)
PATH = Kind("an absolute path", _path)
ADDRESS = Kind('"host:port", or "" for none', _address)
ADDRESSES = Kind(
    "a list of addresses", _addresses, lambda text: [p.strip() for p in text.split(",") if p.strip()]
)
FILES = Kind("files by trust domain", _files, _files_of_text)
RATE = Kind('a rate such as "800Mbit/s" or "100MB/s"; 0: no limit', _rate, _number_of_text)
SECONDS = Kind('seconds, or a time such as "2m"', _seconds, _number_of_text)
FLAG = Kind(
    "true or false",
    lambda value: value if isinstance(value, bool) else _refuse("true or false"),
    lambda text: {"true": True, "false": False}.get(text.lower(), text),
)


def _refuse(what: str) -> Any:
    raise ValueError(what)
