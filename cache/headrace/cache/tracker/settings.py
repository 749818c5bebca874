"""Which Redis or Valkey the nodes share, and how it is spoken to. No secret is in here: only where secrets are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from headrace.cache.errors import UsageError

PASSWORD_VARIABLE = "HEADRACE_REDIS_PASSWORD"
SENTINEL_PASSWORD_VARIABLE = "HEADRACE_SENTINEL_PASSWORD"
_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
_PREFIX = re.compile(r"^[A-Za-z0-9._:-]{1,64}$")


@dataclass(frozen=True, slots=True)
class TrackerSettings:
    """How nodes reach what they share; can be written as JSON.

    Attributes:
        url: `redis://host:port/db`, `rediss://` with TLS, or `redis+sentinel://host:port,host:port/service/db`
            (`rediss+sentinel://`: TLS to Sentinel and to the server). It carries no password.
        user: of the server's access list; None: its default user.
        password_file: a file whose first line is the password. Without one `$HEADRACE_REDIS_PASSWORD` is used if
            it is set.
        sentinel_user, sentinel_password_file: the same for Sentinel itself (`$HEADRACE_SENTINEL_PASSWORD`).
        prefix: what every key begins with: clusters with different ones do not see each other.
        ca: certificates that the server's is checked with (PEM); None: the system's.
        certificate, key: this node's, for a server that asks for one (PEM).
        lease: seconds for which a claim to read from the origin holds unless it is kept.
        lifetime: seconds for which keys stay that no node renews.
        timeout: seconds for one call, connecting included.
    """

    url: str
    user: str | None = None
    password_file: str | None = None
    sentinel_user: str | None = None
    sentinel_password_file: str | None = None
    prefix: str = "headrace"
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    lease: float = 10.0
    lifetime: float = 3600.0
    timeout: float = 2.0

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be meant."""
        parsed = urlsplit(self.url)
        if parsed.username is not None or parsed.password is not None or "@" in parsed.netloc:
            raise UsageError(
                "the tracker's url carries a user or password, which would show in logs: name `user` and "
                f"`password_file`, or set ${PASSWORD_VARIABLE}."
            )
        if parsed.scheme not in _SCHEMES:
            raise UsageError(
                f"the tracker's url {self.url!r} has to begin with {', '.join(f'{s}://' for s in _SCHEMES)}."
            )
        self.servers()
        self.database()
        if self.sentinel and not self.service:
            raise UsageError(
                f"the tracker's url {self.url!r} names no service: write redis+sentinel://host:port/service."
            )
        if not _PREFIX.match(self.prefix):
            raise UsageError(
                f"the tracker's prefix {self.prefix!r} has to be 1 to 64 letters, digits or any of . _ : -"
            )
        if bool(self.certificate) != bool(self.key):
            raise UsageError("the tracker's certificate and key belong together: name both or none.")
        if (self.ca or self.certificate) and not self.tls:
            raise UsageError(
                f"the tracker has certificates but its url {self.url!r} asks for no TLS: write rediss."
            )
        for name, least in (("lease", 0.1), ("lifetime", 1.0), ("timeout", 0.05)):
            if not getattr(self, name) >= least:
                raise UsageError(
                    f"the tracker's {name} is {getattr(self, name)!r}; it has to be at least {least:g}."
                )
        if self.lifetime < 2 * self.lease:
            raise UsageError("the tracker's lifetime has to be at least twice its lease.")

    @property
    def tls(self) -> bool:
        return self.url.startswith("rediss")

    @property
    def sentinel(self) -> bool:
        return "+sentinel:" in self.url

    @property
    def service(self) -> str:
        """The name under which Sentinel knows the server."""
        return self._path()[0] if self.sentinel and self._path() else ""

    @property
    def place(self) -> str:
        """The server as messages name it."""
        return f"{urlsplit(self.url).netloc}{f' ({self.service})' if self.sentinel else ''}"

    def servers(self) -> list[tuple[str, int]]:
        """Hosts and ports of the url. Raises UsageError."""
        default = 26379 if self.sentinel else 6379
        found = []
        for one in urlsplit(self.url).netloc.split(","):
            host, port = _host_port(one)
            if not host or not (port or str(default)).isdigit() or not 0 < int(port or default) < 65536:
                raise UsageError(f"the tracker's url {self.url!r} has no host:port at {one!r}.")
            found.append((host, int(port or default)))
        if len(found) > 1 and not self.sentinel:
            raise UsageError(
                f"the tracker's url {self.url!r} names several servers: only redis+sentinel:// can."
            )
        return found

    def database(self) -> int:
        """The number of the database. Raises UsageError."""
        parts = self._path()[1:] if self.sentinel else self._path()
        if len(parts) > 1 or any(not part.isdigit() for part in parts):
            raise UsageError(
                f"the tracker's url {self.url!r} has to end with a database's number, or nothing."
            )
        return int(parts[0]) if parts else 0

    def password(self, environ: Mapping[str, str] | None = None) -> str | None:
        """Raises UsageError when the file cannot be read; names it."""
        return _password(self.password_file, PASSWORD_VARIABLE, environ)

    def sentinel_password(self, environ: Mapping[str, str] | None = None) -> str | None:
        """Raises UsageError when the file cannot be read; names it."""
        return _password(self.sentinel_password_file, SENTINEL_PASSWORD_VARIABLE, environ)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "the tracker's settings") -> TrackerSettings:
        """Settings from a configuration's section or another process.

        Raises:
            UsageError: a key is unknown, missing or of the wrong kind; names it.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(
                f"{where}: there is no setting {unknown[0]!r}; known are {', '.join(sorted(known))}."
            )
        if "url" not in values:
            raise UsageError(f"{where}: `url` is missing, such as redis://redis.example:6379.")
        for name, value in values.items():
            if name in ("lease", "lifetime", "timeout"):
                good = isinstance(value, int | float) and not isinstance(value, bool)
            else:
                good = isinstance(value, str) or (value is None and name not in ("url", "prefix"))
            if not good:
                raise UsageError(f"{where}: {name!r} cannot be {value!r}.")
        return cls(**values)

    def _path(self) -> list[str]:
        return [part for part in urlsplit(self.url).path.split("/") if part]


def _host_port(text: str) -> tuple[str, str]:
    """Of "host:port", "host", "[v6]:port" or "[v6]"."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = text.partition(":")
    return host, port


def _password(file: str | None, variable: str, environ: Mapping[str, str] | None) -> str | None:
    if file is None:
        return (os.environ if environ is None else environ).get(variable) or None
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"the password file {file!r} of the tracker cannot be read: {reason}.") from None
    if not lines or not lines[0]:
        raise UsageError(f"the password file {file!r} of the tracker is empty.")
    return lines[0]
