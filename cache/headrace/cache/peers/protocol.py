"""What peers say to each other: paths, headers, status codes. See docs/peers.md.

No file path travels: a request names a trust domain, an id of 64 hex digits, and chunk numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from headrace.cache.bandwidth import Class
from headrace.cache.errors import OtherVersion, PeerError, PeerMissing

MAJOR, MINOR = 1, 0
VERSION = f"{MAJOR}.{MINOR}"
"""Of this headrace. Another minor version is understood: unknown headers are ignored."""

VERSION_HEADER = "Headrace-Version"
CLASS_HEADER = "Headrace-Class"
QUEUE_HEADER = "Headrace-Queue"
WAIT_HEADER = "Headrace-Retry-After"
ALGORITHM_HEADER = "Headrace-Algorithm"

MAX_HEAD = 8 << 10
"""Bytes of a request's or an answer's head."""
MAX_SENTENCE = 1 << 10
"""Bytes of the sentence that says why not."""

What = Literal["chunks", "digests", "held", "manifest", "ping"]

_ID = "[0-9a-f]{64}"
_PATHS = (
    re.compile(
        rf"(?P<domain>[^/]+)/objects/(?P<id>{_ID})/(?P<what>chunks|digests)/(?P<first>\d{{1,8}})-(?P<last>\d{{1,8}})"
    ),
    re.compile(rf"(?P<domain>[^/]+)/snapshots/(?P<id>{_ID})/(?P<what>held|manifest)"),
    re.compile(r"(?P<what>ping)"),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for.

    Attributes:
        id: of the object or snapshot; "" for a ping.
        first, last: the chunks [first, last).
    """

    what: What
    domain: str = ""
    id: str = ""
    first: int = 0
    last: int = 0

    @property
    def path(self) -> str:
        """As it stands in a request."""
        if self.what == "ping":
            return f"/v{MAJOR}/ping"
        base = f"/v{MAJOR}/{quote(self.domain, safe='')}"
        if self.what in ("held", "manifest"):
            return f"{base}/snapshots/{self.id}/{self.what}"
        return f"{base}/objects/{self.id}/{self.what}/{self.first}-{self.last}"

    @staticmethod
    def parse(path: str) -> Ask:
        """
        Raises:
            PeerMissing: nothing of this protocol.
            OtherVersion: of another major version.
        """
        version, _, rest = path.removeprefix("/v").partition("/")
        if not path.startswith("/v") or not version.isdecimal():
            raise PeerMissing("there is nothing at this path.")
        if int(version) != MAJOR:
            raise OtherVersion(other_version(version))
        for pattern in _PATHS:
            if found := pattern.fullmatch(rest):
                parts = found.groupdict()
                ask = Ask(
                    parts["what"],  # type: ignore[arg-type]
                    unquote(parts.get("domain", "")),
                    parts.get("id", ""),
                    int(parts.get("first", 0)),
                    int(parts.get("last", 0)),
                )
                if ask.what not in ("chunks", "digests") or ask.first < ask.last:
                    return ask
        raise PeerMissing("there is nothing at this path.")


def other_version(version: str) -> str:
    """The sentence for a peer of another major version."""
    text = "".join(c for c in version[:16] if c.isalnum() or c == ".") or "?"
    return (
        f"the other node speaks version {text} of the peer protocol, this one {VERSION}: upgrade the older."
    )


def check_version(text: str | None) -> None:
    """
    Raises:
        PeerError: no headrace.
        OtherVersion: one of another major version.
    """
    if text is None:
        raise PeerError("what answers is not a headrace agent: check the address.")
    if text.partition(".")[0] != str(MAJOR):
        raise OtherVersion(other_version(text))


def class_of(text: str | None) -> Class:
    """Of a request; what a newer peer calls otherwise may wait."""
    return "demand" if text in (None, "demand") else "prestage"
