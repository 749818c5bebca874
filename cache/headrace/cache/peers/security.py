"""Who may ask whom: secrets of trust domains, or certificates.

A domain's secrets are lines of a file, the same on all nodes: the first signs, all are accepted, so that they can
be changed one node after the other. With certificates (mutual TLS) whoever has one of the cluster's own
authority is a node. Nothing listens beyond loopback without the one or the other.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace.cache.errors import NotAuthenticated

LEAST_SECRET = 16
"""Characters of a secret, at least."""

_MOST_FILE = 64 << 10
_KEY_ID = 8


@dataclass(frozen=True, slots=True)
class Secret:
    """One shared secret. `id` names it on the wire and tells nothing about it."""

    id: str
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, text: str) -> Secret:
        key = text.encode()
        return cls(hashlib.sha256(b"headrace key id\0" + key).hexdigest()[:_KEY_ID], key)

    def mac(self, *parts: bytes) -> bytes:
        """HMAC-SHA256 over parts, each with its length before it."""
        state = hmac.new(self.key, digestmod=hashlib.sha256)
        for part in parts:
            state.update(len(part).to_bytes(8, "big"))
            state.update(part)
        return state.digest()


@dataclass(frozen=True, slots=True)
class SecurityFiles:
    """Where the secrets and certificates are: what a configuration says, and can be written as JSON.

    Attributes:
        secrets: files by trust domain; each line of a file is a secret, the first one signs.
        ca: certificates of the cluster's own authority (PEM).
        certificate, key: this node's, by that authority (PEM).
    """

    secrets: Mapping[str, str] = field(default_factory=dict)
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def load(self) -> Security:
        """Read them.

        Raises:
            NotAuthenticated: a file is missing, unreadable or wrong; names it, never what is in it.
        """
        secrets = {domain: _read_secrets(path) for domain, path in self.secrets.items()}
        given = [part for part in (self.ca, self.certificate, self.key) if part]
        if given and len(given) < 3:
            raise NotAuthenticated(
                "mutual TLS needs all three of ca, certificate and key: give the missing one."
            )
        security = Security(secrets, self if given else None)
        if given:
            # What is wrong shows now and not at the first connection.
            security.server_context()
        return security


@dataclass(frozen=True, slots=True)
class Security:
    """What this node proves and demands. Empty: nothing, which is for loopback only.

    Attributes:
        secrets: of each trust domain; the first signs.
        tls: the files for mutual TLS, or None.
    """

    secrets: Mapping[str, tuple[Secret, ...]] = field(default_factory=dict, repr=False)
    tls: SecurityFiles | None = None

    @classmethod
    def shared(cls, **secrets: str) -> Security:
        """Of secrets themselves, by trust domain, where no file is meant."""
        return cls({domain: (Secret.of(text),) for domain, text in secrets.items()})

    @property
    def open(self) -> bool:
        """Whether nothing is demanded."""
        return not self.secrets and self.tls is None

    def check_listen(self, host: str) -> None:
        """Raises NotAuthenticated for an address beyond loopback when nothing is demanded."""
        if self.open and not _is_loopback(host):
            raise NotAuthenticated(
                f"refusing to listen on {host or 'every address'} without a secret or certificates, where anybody "
                f"could read models: name a secret file or mutual TLS, or listen on 127.0.0.1."
            )

    def signing(self, domain: str) -> Secret | None:
        """The secret that signs for a domain."""
        found = self.secrets.get(domain)
        return found[0] if found else None

    def any_signing(self) -> Secret | None:
        """A secret for what belongs to no domain."""
        return next((found[0] for found in self.secrets.values()), None)

    def seal(self, domain: str, *parts: bytes) -> bytes:
        """A MAC with the domain's secret, for what travels through others' hands; b"" without a secret."""
        secret = self.signing(domain)
        return b"" if secret is None else bytes.fromhex(secret.id) + secret.mac(b"seal", *parts)

    def sealed(self, domain: str, seal: bytes, *parts: bytes) -> bool:
        """Whether a seal is one of the domain's; anything is where the domain has no secret."""
        known = self.secrets.get(domain)
        if not known:
            return True
        width = _KEY_ID // 2
        return any(
            bytes.fromhex(s.id) == seal[:width] and hmac.compare_digest(s.mac(b"seal", *parts), seal[width:])
            for s in known
        )

    def server_context(self) -> ssl.SSLContext | None:
        """For the side that is connected to; None without mutual TLS.

        Raises:
            NotAuthenticated: a file is missing or wrong.
        """
        return None if self.tls is None else _context(self.tls, ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext | None:
        """For the side that connects; None without mutual TLS.

        Raises:
            NotAuthenticated: a file is missing or wrong.
        """
        return None if self.tls is None else _context(self.tls, ssl.PROTOCOL_TLS_CLIENT)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _read_secrets(path: str) -> tuple[Secret, ...]:
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_FILE + 1).decode()
    except OSError as error:
        raise NotAuthenticated(f"the secret file {path!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise NotAuthenticated(
            f"the secret file {path!r} is not text: write one secret on each line."
        ) from None
    if len(text) > _MOST_FILE:
        raise NotAuthenticated(
            f"the secret file {path!r} is larger than {_MOST_FILE} bytes: is it the right file?"
        )
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise NotAuthenticated(
            f"the secret file {path!r} has no secret in it: write one, e.g. by `openssl rand -hex 32`."
        )
    if any(len(line) < LEAST_SECRET for line in found):
        raise NotAuthenticated(
            f"a secret in {path!r} is shorter than {LEAST_SECRET} characters: make one by `openssl rand -hex 32`."
        )
    return tuple(Secret.of(line) for line in dict.fromkeys(found))


def _context(files: SecurityFiles, protocol: int) -> ssl.SSLContext:
    assert files.ca and files.certificate and files.key
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Nodes are known by address; what counts is that the cluster's own authority vouches for them.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    for path in (files.ca, files.certificate, files.key):
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise NotAuthenticated(f"the TLS file {path!r} cannot be read: {error.strerror}.") from None
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError:
        raise NotAuthenticated(f"{files.ca!r} holds no certificate of an authority (PEM).") from None
    try:
        # A password would be asked for on the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (ssl.SSLError, ValueError):
        raise NotAuthenticated(
            f"the certificate {files.certificate!r} and the key {files.key!r} are not a pair without a password (PEM)."
        ) from None
    return context
