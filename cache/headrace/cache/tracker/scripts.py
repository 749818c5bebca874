"""The scripts that run in Redis. They lie beside this module as files of their own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """One script. Redis knows it by its digest once it has seen its text."""

    name: str
    text: str
    sha: str


@cache
def script(name: str) -> Script:
    """The script `name`, with what it shares with others before it."""
    folder = resources.files("headrace.cache.tracker") / "lua"
    text = (folder / f"{name}.lua").read_text()
    if name not in ("lock", "unlock"):
        text = (folder / "rows.lua").read_text() + text
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
