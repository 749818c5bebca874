"""Requests and answers as the scripts read and write them: packed, big-endian.

An answer has of each wanted chunk its kind (`h` somebody holds it, `c` claimed, `r` another reads it, `-` none of
these) and, of those that somebody holds, the row: one bit per node of the swarm. Rows of more than `LONGEST` bytes
are answered in part, and each part comes with its number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cache.errors import UsageError
from headrace.cache.tracker.protocol import Exchange, Peer

LONGEST = 128
"""Bytes of a row that an answer carries, at most; the scripts know it, too."""

_NUMBERS = struct.Struct(">8H2B3I")
_HEAD = struct.Struct(">4I")
_CHUNK = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Rows:
    """An answer, unpacked.

    Attributes:
        columns: of a row.
        epoch: changes when a column may have another owner.
        blocks: of 64 columns that are given to zones.
        slot: the asking node's column, or one beyond all.
        kinds: one character per wanted chunk.
        rows: bits of the chunks of kind `h`, in their order, the first column in the highest of `width` bits.
        starts: the first column of each.
        width: columns in each.
        digests: as they were kept, one per wanted chunk; empty when there are none.
    """

    columns: int
    epoch: int
    blocks: int
    slot: int
    kinds: str
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    width: int
    digests: Sequence[bytes | None]


def pack_chunks(chunks: Sequence[int]) -> bytes:
    return struct.pack(f">{len(chunks)}I", *chunks)


def pack_request(
    request: Exchange,
    digests: Sequence[tuple[int, bytes]],
    *,
    renew: bool,
    stamp: bool,
    lease: float,
    lifetime: float,
    seed: int,
) -> list[bytes | str]:
    """The arguments of the script `exchange` after the node's id.

    Args:
        digests: chunk and what is kept of it.
        renew: the keys' time to live.
        stamp: note that the node gained something just now.
        lease, lifetime: seconds.
        seed: 32 bits: Redis has no chance of its own.
    """
    lists = (
        request.gained,
        request.lost,
        [chunk for chunk, _ in request.missing],
        request.give_back,
        request.keep,
        request.wanted,
    )
    numbers = _NUMBERS.pack(
        *map(len, lists),
        len(digests),
        request.claims,
        renew,
        stamp,
        round(lease * 1000),
        round(lifetime * 1000),
        seed,
    )
    chunks = pack_chunks([chunk for one in lists for chunk in one])
    said = [_CHUNK.pack(chunk) + kept for chunk, kept in digests]
    return [numbers, chunks, *(node for _, node in request.missing), *said]


def unpack_rows(answer: Sequence[bytes | list[bytes | None]]) -> Rows:
    """Raises ValueError for what no script of ours answers."""
    head, kinds, rows, parts = answer[1:5]
    if not all(isinstance(part, bytes) for part in (head, kinds, rows, parts)):
        raise ValueError("not an answer of ours")
    assert isinstance(head, bytes) and isinstance(kinds, bytes) and isinstance(rows, bytes)
    try:
        columns, epoch, blocks, slot = _HEAD.unpack(head)
    except struct.error as error:
        raise ValueError(str(error)) from None
    held = kinds.count(b"h")
    size = min(columns // 8, LONGEST)
    if columns % 64 or not columns or len(rows) != held * size or set(kinds) - set(b"hcr-"):
        raise ValueError("rows of another length")
    if parts and len(parts) != held:
        raise ValueError("rows without their numbers")
    assert isinstance(parts, bytes)
    digests = answer[5] if len(answer) > 5 else []
    assert isinstance(digests, list)
    return Rows(
        columns,
        epoch,
        blocks,
        slot,
        kinds.decode(),
        tuple([int.from_bytes(rows[at : at + size], "big") for at in range(0, len(rows), size)]),
        tuple([part * LONGEST * 8 for part in parts]) or (0,) * held,
        size * 8,
        digests,
    )


def pack_peer(peer: Peer) -> str:
    """Raises UsageError for a peer that would not be read back as it is."""
    if any("\n" in part for part in (peer.id, peer.address, peer.zone)) or not peer.id or len(peer.id) > 128:
        raise UsageError(f"the node's id, address or zone cannot be used: {peer!r}.")
    return f"{peer.id}\n{peer.address}\n{peer.zone}"


def unpack_peer(record: bytes) -> Peer:
    """Raises ValueError."""
    node, address, zone = record.decode().split("\n")
    return Peer(node, address, zone)
