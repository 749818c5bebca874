"""How values lie in what all nodes share: compressed where that pays, with a MAC where the cluster has a secret.

Access to Redis alone is then not enough to plant a manifest, a resolution or a learned digest. An old value put
back in its place is not noticed; its age is Redis's word.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import struct
import zlib
from collections.abc import Sequence

LARGEST = 16 << 20
"""Bytes of a value, at most."""
LARGEST_DIGEST = 64
COMPRESSED = 1 << 10
"""Bytes from which a value is compressed."""

_MAC = 16
_DIGEST_MAC = 8
_HEAD = struct.Struct(">Bd")
_PLAIN, _ZLIB = 0, 1
_log = logging.getLogger(__name__)


class Seals:
    """MACs with the cluster's secrets: the first one signs, all are accepted; without any, nothing is demanded."""

    def __init__(self, secrets: Sequence[bytes] = ()) -> None:
        self._secrets = tuple(secrets)
        self._said = False

    def pack(self, key: str, value: bytes, seconds: float) -> bytes | None:
        """A value as it is kept; None when it is too large.

        Args:
            seconds: for how long it will be kept.
        """
        if len(value) > LARGEST:
            _log.warning("a value of %d bytes is too large to share between nodes", len(value))
            return None
        kind, body = _PLAIN, value
        if len(value) >= COMPRESSED:
            kind, body = _ZLIB, zlib.compress(value, 1)
        kept = _HEAD.pack(kind, seconds) + body
        return kept + self._mac(0, b"value", key.encode(), kept)[:_MAC]

    def unpack(self, key: str, kept: bytes) -> tuple[bytes, float] | None:
        """The value, and for how long it was to be kept; None, and one line in the log, when it is not ours."""
        width = _MAC if self._secrets else 0
        body, mac = kept[: len(kept) - width], kept[len(kept) - width :]
        if not self._sealed(mac, _MAC, b"value", key.encode(), body):
            self._refuse("a value")
            return None
        try:
            kind, seconds = _HEAD.unpack_from(body)
            value = body[_HEAD.size :]
            if kind == _ZLIB:
                value = _inflate(value)
            elif kind != _PLAIN:
                raise ValueError("of another kind")
        except (struct.error, zlib.error, ValueError):
            self._refuse("a value")
            return None
        return value, seconds

    def pack_digest(self, swarm: str, chunk: int, digest: bytes) -> bytes:
        """Raises ValueError for one that is no digest."""
        if not 0 < len(digest) <= LARGEST_DIGEST:
            raise ValueError(f"a digest has 1 to {LARGEST_DIGEST} bytes, not {len(digest)}")
        return digest + self._mac(0, b"digest", swarm.encode(), b"%d" % chunk, digest)[:_DIGEST_MAC]

    def unpack_digest(self, swarm: str, chunk: int, kept: bytes) -> bytes | None:
        width = _DIGEST_MAC if self._secrets else 0
        digest, mac = kept[: len(kept) - width], kept[len(kept) - width :]
        sealed = self._sealed(mac, _DIGEST_MAC, b"digest", swarm.encode(), b"%d" % chunk, digest)
        if not sealed or not 0 < len(digest) <= LARGEST_DIGEST:
            self._refuse("a digest")
            return None
        return digest

    def _mac(self, which: int, *parts: bytes) -> bytes:
        if not self._secrets:
            return b""
        state = hmac.new(self._secrets[which], digestmod=hashlib.sha256)
        for part in parts:
            state.update(len(part).to_bytes(8, "big") + part)
        return state.digest()

    def _sealed(self, mac: bytes, width: int, *parts: bytes) -> bool:
        if not self._secrets:
            return True
        return any(
            hmac.compare_digest(self._mac(which, *parts)[:width], mac) for which in range(len(self._secrets))
        )

    def _refuse(self, what: str) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "%s in Redis was not put there by a node with this cluster's secret; such values are ignored",
                what,
            )


def _inflate(data: bytes) -> bytes:
    """Raises ValueError for more than `LARGEST` bytes, zlib.error for what is not compressed."""
    stream = zlib.decompressobj()
    value = stream.decompress(data, LARGEST + 1)
    if len(value) > LARGEST or not stream.eof:
        raise ValueError("too large, or cut off")
    return value
