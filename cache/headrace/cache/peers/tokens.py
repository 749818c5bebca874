"""Tokens: how one request proves that its sender has a domain's secret, once and for a short time.

::

    Authorization: Headrace-1 <key id> <time, seconds> <nonce, hex> <MAC, hex>

The MAC (HMAC-SHA256) is over method, host, path, time and nonce. Who reads it on the wire can neither use it for
another path nor a second time; a clock that is wrong is told so.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Iterable

from headrace.cache.errors import NotAuthenticated, PeerBusy
from headrace.cache.peers.security import Secret

SCHEME = "Headrace-1"
WINDOW = 60.0
"""Seconds that two nodes' clocks may differ, the way of the request included."""

_NONCE = 16
_MOST_NONCES = 1 << 17


def make(secret: Secret, method: str, host: str, path: str, now: float) -> str:
    """The value of `Authorization`.

    Args:
        host: the "host:port" that is asked.
        now: seconds since the epoch.
    """
    time, nonce = f"{now:.3f}", secrets.token_hex(_NONCE)
    return f"{SCHEME} {secret.id} {time} {nonce} {_mac(secret, method, host, path, time, nonce).hex()}"


def check(
    token: str | None,
    known: Iterable[Secret],
    method: str,
    host: str,
    path: str,
    now: float,
    replays: Replays,
) -> None:
    """Whether a request may be answered.

    Args:
        known: the secrets that count for this path.

    Raises:
        NotAuthenticated: says why, without anything secret.
        PeerBusy: so many requests that replays could not be noticed any more.
    """
    if token is None:
        raise NotAuthenticated("this node demands a token: give the asking node the same secret file.")
    parts = token.split(" ")
    if len(parts) != 5 or not parts[0].startswith("Headrace-"):
        raise NotAuthenticated("the Authorization is not a headrace token.")
    if parts[0] != SCHEME:
        raise NotAuthenticated(
            f"the token is of another kind than {SCHEME}: run the same headrace on all nodes."
        )
    _, key_id, time, nonce, mac = parts
    secret = next((s for s in known if s.id == key_id), None)
    if secret is None:
        raise NotAuthenticated(
            f"the token's secret (key {_plain(key_id)}) is not one of this trust domain here: "
            f"give both nodes the same secret file."
        )
    right = _mac(secret, method, host, path, time, nonce).hex()
    if not hmac.compare_digest(right.encode(), mac.encode(errors="replace")):
        raise NotAuthenticated("the token does not belong to this request.")
    # From here on the sender has the secret, so its time and nonce are well-formed, unless it is broken.
    try:
        difference = float(time) - now
        raw = bytes.fromhex(nonce)
    except ValueError:
        raise NotAuthenticated("the token's time or nonce is malformed.") from None
    if not abs(difference) <= WINDOW or len(raw) != _NONCE:
        raise NotAuthenticated(
            f"the asking node's clock is {abs(difference):.0f} s {'ahead' if difference > 0 else 'behind'} "
            f"({WINDOW:.0f} s are allowed): synchronise the clocks of both nodes, or the token was kept back."
        )
    replays.note(raw, now)


class Replays:
    """The nonces of the last minutes. Bounded: when there are too many, nobody new is let in."""

    def __init__(self, most: int = _MOST_NONCES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._since = -2 * WINDOW

    def note(self, nonce: bytes, now: float) -> None:
        """
        Raises:
            NotAuthenticated: it came before.
            PeerBusy: no room for more.
        """
        with self._lock:
            # A token lives from WINDOW before its time to WINDOW after it.
            if now - self._since >= 2 * WINDOW:
                forgotten = now - self._since >= 4 * WINDOW
                self._old, self._young, self._since = set() if forgotten else self._young, set(), now
            if nonce in self._young or nonce in self._old:
                raise NotAuthenticated("the token was used before.")
            if len(self._young) >= self._most:
                raise PeerBusy("this node gets more requests than it can keep apart: ask again later.", 1.0)
            self._young.add(nonce)


def _mac(secret: Secret, method: str, host: str, path: str, time: str, nonce: str) -> bytes:
    return secret.mac(b"token", method.encode(), host.encode(), path.encode(), time.encode(), nonce.encode())


def _plain(text: str) -> str:
    return "".join(c for c in text[:16] if c.isalnum())
