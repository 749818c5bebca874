"""Model references: a URI, optionally with `@revision`.

A bare path is `file://`. The scheme is checked against the known ones (and fsspec's registry at
resolution), so that a typo ends in a suggestion instead of a search on disk.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from headrace.cache.errors import UsageError

# Alternative spellings users know from other tools, by canonical scheme.
ALIASES = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "azure": "az",
    "wasb": "az",
    "wasbs": "az",
    "huggingface": "hf",
}
NATIVE_SCHEMES = ("s3", "gs", "az", "http", "https", "oss", "hf", "file")
# Where `@` in the last path segment names a revision; elsewhere it is part of the key.
REVISION_SCHEMES = ("hf",)

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(//)?")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed model reference.

    Attributes:
        scheme: canonical scheme, e.g. "s3".
        location: what follows "://" without the revision and without trailing slashes:
            "bucket/prefix", "org/name", "host:port/path", or an absolute path for "file".
        revision: what followed "@", or None.
    """

    scheme: str
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.uri}@{self.revision}" if self.revision else self.uri

    @property
    def uri(self) -> str:
        """The canonical URI, without the revision."""
        return f"{self.scheme}://{self.location}"

    @property
    def container(self) -> str:
        """Bucket, container, or host: the part of the location before the first slash."""
        return self.location.partition("/")[0]

    @property
    def key(self) -> str:
        """The part of the location after the first slash; "" at the top of the container."""
        return self.location.partition("/")[2]


def parse(text: str) -> Reference:
    """Parse what a user typed.

    Raises:
        UsageError: empty, NUL or newline inside, or a scheme with nothing behind it.
    """
    if not text or text != text.strip():
        raise UsageError(
            f"{text!r} is not a model reference: give a URI such as s3://bucket/model, or a path."
        )
    if any(ord(c) < 32 for c in text):
        raise UsageError(f"the model reference {text!r} contains control characters.")
    match = _SCHEME.match(text)
    if match is None:
        return _local(text)
    scheme = match[1].lower()
    if match[2] is None:
        if os.path.exists(text):
            return _local(text)
        raise UsageError(
            f"{text!r} has no '//' after the scheme: did you mean {scheme}://{text[match.end() :]}?"
        )
    scheme = ALIASES.get(scheme, scheme)
    rest = text[match.end() :]
    if scheme == "file":
        return _local(unquote(rest) or "/")
    revision = None
    if scheme in REVISION_SCHEMES and "@" in rest:
        rest, _, revision = rest.partition("@")
        if not revision:
            raise UsageError(f"{text!r} ends in '@' without a revision.")
        revision = unquote(revision)
        # hf://org/name@rev/sub/dir: the path after the revision belongs to the location
        if "/" in revision and not revision.startswith("refs/"):
            revision, _, sub = revision.partition("/")
            rest = f"{rest}/{sub}"
    rest = rest.rstrip("/")
    if not rest.partition("/")[0]:
        raise UsageError(f"{text!r} names no bucket, repository or host after {scheme}://.")
    return Reference(scheme, rest, revision)


def unknown_scheme(scheme: str, known: tuple[str, ...] = NATIVE_SCHEMES) -> UsageError:
    """The error for a scheme that nothing serves, with the nearest known one."""
    close = difflib.get_close_matches(scheme, known, n=1, cutoff=0.5)
    hint = (
        f" Did you mean {close[0]}://?"
        if close
        else f" Known schemes: {', '.join(NATIVE_SCHEMES)}, and fsspec's."
    )
    return UsageError(f"no origin serves the scheme {scheme}://.{hint}")


def _local(path: str) -> Reference:
    return Reference("file", os.path.abspath(os.path.expanduser(path)))


def quoted(path: str) -> str:
    """A relative path as part of a URI."""
    return quote(path, safe="/-_.~+=@")
