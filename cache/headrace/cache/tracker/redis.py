"""The tracker in Redis or Valkey.

All that is decided for a batch is decided by one script (see `lua/`), so that two nodes can never be given the
same claim. Answers carry rows of the bitmap; the choice of holders, and what the columns stand for, is this side's:
it remembers the owners of columns until the swarm's epoch changes.

Crash story: nothing here is needed for correctness. Redis lost or emptied: `register` says so and everything is
announced again; claims that are still needed are made again by `keep`. A node that dies is cleared up after by any
other's `register`; until then it is named as a holder, and whoever asks it goes on to the next. Keys expire.
"""

from __future__ import annotations

import logging
import random
import secrets as chance
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from headrace.cache.errors import TrackerUnavailable
from headrace.cache.tracker.keys import Keys, swarm_name, swarm_of
from headrace.cache.tracker.once import once
from headrace.cache.tracker.packing import (
    Rows,
    pack_chunks,
    pack_peer,
    pack_request,
    unpack_peer,
    unpack_rows,
)
from headrace.cache.tracker.protocol import MAX_KIN, MAX_WANTED, SETTLED, Answer, Exchange, Peer, Swarm
from headrace.cache.tracker.sample import sample
from headrace.cache.tracker.scripts import script
from headrace.cache.tracker.settings import TrackerSettings
from headrace.cache.tracker.values import Seals

BATCH = 1000
"""Chunks that one script call takes in, at most: it blocks Redis for about a millisecond."""
ANNOUNCED = 1024
CLEARED = 2000
LOOKED = 500
CLEARING = 16
"""Script calls that one `register` spends on clearing up, at most."""
GONE = 4
"""Nodes that one `register` clears up after, at most."""
KIN_LIFETIME = 7 * 86400.0
LARGEST_BITMAP = 256 << 20
RENEWED = 5.0
"""Seconds between two exchanges that renew the time to live of a swarm's keys."""

_Packed = TypeVar("_Packed")
_Read = TypeVar("_Read")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _View:
    """What this node remembers of a swarm's columns.

    Attributes:
        owners: of columns.
        near: bits of the columns of this node's zone, the first column in the highest of `columns` bits.
        renewed: when it last renewed the keys' time to live.
        stamped: when it last noted that it gained something.
    """

    columns: int = 0
    epoch: int = -1
    blocks: int = 0
    owners: dict[int, Peer] = field(default_factory=dict)
    near: int = 0
    renewed: float = float("-inf")
    stamped: float = float("-inf")


class RedisTracker:
    """One node's way to the tracker: a `Tracker`.

    Args:
        me: this node.
        secrets: of the cluster, for the values that matter: the first signs, all are accepted.
        settled: see `SETTLED`.
        seed: of the choice among holders.
    """

    def __init__(
        self,
        settings: TrackerSettings,
        me: Peer,
        secrets: Sequence[bytes] = (),
        *,
        settled: float = SETTLED,
        seed: int | None = None,
    ) -> None:
        """Raises UsageError, and MissingDependency without the client library."""
        from headrace.cache.tracker.link import Link

        pack_peer(me)
        self._me = me
        self._settings = settings
        self._link = Link(settings)
        self._keys = Keys(settings.prefix)
        self._seals = Seals(secrets)
        self._settled = settled
        self._random = random.Random(seed)
        self._token = chance.token_hex(8)
        self._known_as = ""
        self._members: list[Peer] = []
        self._members_as: bytes | None = None
        self._views: dict[Swarm, _View] = {}
        self._claims: dict[Swarm, set[int]] = {}

    # Members

    async def register(self, peer: Peer, seconds: float) -> bool:
        self._me = peer
        keys = self._keys
        answer = await self._link.run(
            script("register"),
            [keys.node(peer.id), keys.deadlines, keys.swarms(peer.id), keys.members],
            [
                peer.id,
                pack_peer(peer),
                chance.token_hex(8),
                _milliseconds(seconds),
                self._lifetime,
                keys.node(""),
                keys.clears(""),
                GONE,
            ],
        )
        token: str = answer[0].decode()
        budget = CLEARING
        for gone in answer[1:]:
            budget -= await self._clear(gone, budget, may_live=False)
        new, self._known_as = token != self._known_as, token
        return new

    async def unregister(self) -> None:
        try:
            await self._link.command("DEL", self._keys.node(self._me.id))
            await self._clear(self._me.id.encode(), 1 << 20, may_live=True)
        except TrackerUnavailable as error:
            _log.info("not unregistered, which others will notice: %s", error)
        self._known_as = ""

    async def members(self) -> list[Peer]:
        token = await self._link.command("GET", self._keys.members)
        if token is None or token != self._members_as:
            names = await self._link.command("ZRANGE", self._keys.deadlines, 0, -1)
            keys = [self._keys.node(name.decode(errors="replace")) for name in names]
            found = await self._link.command("MGET", *keys) if keys else []
            living = (record.partition(b"\n")[2] for record in found if record is not None)
            self._members = [self._ours(unpack_peer, record) for record in living]
            self._members.sort(key=lambda peer: peer.id)
            self._members_as = token
        return list(self._members)

    async def _clear(self, name: bytes, budget: int, *, may_live: bool) -> int:
        """Clear up after a node, in at most `budget` script calls. Returns how many it took."""
        spent = 0
        node = name.decode(errors="replace")
        for named in await self._link.command("SMEMBERS", self._keys.swarms(node)):
            swarm = self._ours(swarm_of, named)
            state = b"more"
            while state == b"more":
                if spent >= budget:
                    return spent
                state = await self._drop(swarm, node, may_live=may_live)
                spent += 1
            if state == b"alive":
                return spent
        await self._link.commands(
            ("ZREM", self._keys.deadlines, name),
            ("DEL", self._keys.swarms(node), self._keys.clears(node)),
            ("SET", self._keys.members, chance.token_hex(8), "PX", self._lifetime),
        )
        return spent + 1

    async def _drop(self, swarm: Swarm, node: str, *, may_live: bool) -> Any:
        keys = [*self._keys.swarm(swarm), self._keys.node(node), self._keys.swarms(node)]
        args = [node, swarm.chunks, CLEARED, int(may_live), swarm_name(swarm)]
        return await self._link.run(script("drop"), keys, args)

    # Swarms

    async def announce(self, swarm: Swarm, have: bytes) -> None:
        if len(have) != (swarm.chunks + 7) // 8:
            raise ValueError(f"a map of {swarm.chunks} chunks does not have {len(have)} bytes")
        for first in range(0, swarm.chunks, ANNOUNCED):
            part = have[first // 8 : (first + ANNOUNCED) // 8]
            some = min(ANNOUNCED, swarm.chunks - first)
            settled = round(self._settled * 1000)
            args = [self._me.id, first, some, part, settled, self._lifetime]
            await self._as_member(swarm, "announce", args.copy)

    async def leave(self, swarm: Swarm) -> None:
        self._claims.pop(swarm, None)
        self._views.pop(swarm, None)
        try:
            while await self._drop(swarm, self._me.id, may_live=True) == b"more":
                pass
        except TrackerUnavailable as error:
            _log.info("not said that a snapshot is gone, which others will notice: %s", error)

    async def exchange(self, swarm: Swarm, request: Exchange) -> Answer:
        if len(request.wanted) > MAX_WANTED:
            raise ValueError(f"{len(request.wanted)} chunks wanted at once")
        _check(swarm, request.gained, request.lost, request.wanted, request.keep, request.give_back)
        _check(swarm, [chunk for chunk, _ in request.missing], request.digests)
        mine = self._claims.setdefault(swarm, set())
        # What was claimed and has come needs its claim no more.
        done = mine.intersection(request.gained)
        request = replace(request, give_back=[*request.give_back, *done])
        while len(request.lost) > BATCH:
            await self._exchange(swarm, Exchange(lost=request.lost[:BATCH]))
            request = replace(request, lost=request.lost[BATCH:])
        while len(request.gained) > BATCH:
            some, digests = request.gained[:BATCH], request.digests
            said = {chunk: digests[chunk] for chunk in some if chunk in digests}
            await self._exchange(swarm, Exchange(gained=some, digests=said))
            rest = {chunk: digest for chunk, digest in digests.items() if chunk not in said}
            request = replace(request, gained=request.gained[BATCH:], digests=rest)
        view, rows = await self._exchange(swarm, request)
        if own := [chunk for chunk, start, row in _held(request.wanted, rows) if row & _own(start, rows)]:
            # The tracker believed that the node held what it wants.
            again = Exchange(lost=own, wanted=request.wanted, claims=request.claims)
            view, rows = await self._exchange(swarm, again)
        answer = await self._answer(swarm, view, request.wanted, rows)
        mine.difference_update(request.give_back)
        mine.update(request.keep, answer.claimed)
        return answer

    async def look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        _check(swarm, chunks)
        found = [await self._look(swarm, chunks[at : at + LOOKED]) for at in range(0, len(chunks), LOOKED)]
        if len(found) == 1:
            return found[0]
        return Answer(
            holders={chunk: some for part in found for chunk, some in part.holders.items()},
            counts={chunk: count for part in found for chunk, count in part.counts.items()},
            digests={chunk: digest for part in found for chunk, digest in part.digests.items()},
        )

    async def _look(self, swarm: Swarm, chunks: Sequence[int]) -> Answer:
        rows_key, nodes, _, digests = self._keys.swarm(swarm)
        args = [self._me.id, len(chunks), self._random.getrandbits(31), pack_chunks(chunks)]
        answer = await self._link.run(script("look"), [rows_key, nodes, digests], args)
        if answer[0] == b"?":
            return Answer(counts=dict.fromkeys(chunks, 0))
        rows = self._ours(unpack_rows, answer)
        return await self._answer(swarm, await self._view(swarm, rows), chunks, rows)

    async def _exchange(self, swarm: Swarm, request: Exchange) -> tuple[_View, Rows]:
        name = swarm_name(swarm)
        said = [(c, self._seals.pack_digest(name, c, d)) for c, d in request.digests.items()]

        def args() -> list[Any]:
            now = time.monotonic()
            view = self._views.setdefault(swarm, _View())
            renew = now - view.renewed >= min(RENEWED, self._settings.lifetime / 8)
            stamp = bool(request.gained) and now - view.stamped >= self._settled / 4
            view.renewed = now if renew else view.renewed
            view.stamped = now if stamp else view.stamped
            packed = pack_request(
                request,
                said,
                renew=renew,
                stamp=stamp,
                lease=self._settings.lease,
                lifetime=self._settings.lifetime,
                seed=self._random.getrandbits(31),
            )
            return [self._me.id, *packed]

        rows = self._ours(unpack_rows, await self._as_member(swarm, "exchange", args))
        return await self._view(swarm, rows), rows

    async def _as_member(self, swarm: Swarm, name: str, args: Callable[[], list[Any]]) -> Any:
        """What a script answers to a member of the swarm, which this node then is."""
        for _ in range(3):
            answer = await self._link.run(script(name), self._keys.swarm(swarm), args())
            if answer[0] != b"?":
                return answer
            await self._join(swarm)
            self._views.pop(swarm, None)
        raise TrackerUnavailable(
            "the tracker forgets this node as soon as it is entered: is its memory full?"
        )

    async def _join(self, swarm: Swarm) -> None:
        keys, me = self._keys, self._me
        rows, nodes, _, _ = keys.swarm(swarm)
        answer = await self._link.run(
            script("join"),
            [rows, nodes, keys.node(me.id), keys.swarms(me.id), keys.deadlines, keys.members],
            [
                me.id,
                pack_peer(me),
                me.zone,
                swarm_name(swarm),
                swarm.chunks,
                self._lifetime,
                _milliseconds(self._settings.lease),
                chance.token_hex(8),
                LARGEST_BITMAP,
            ],
        )
        if answer[0] == b"full":
            raise TrackerUnavailable(
                f"the swarm of {swarm.chunks} chunks has more nodes than the tracker keeps."
            )

    async def _view(self, swarm: Swarm, rows: Rows) -> _View:
        """What is remembered of the columns, brought up to date."""
        view = self._views.setdefault(swarm, _View())
        if view.epoch != rows.epoch:
            view.owners.clear()
        if (view.epoch, view.blocks, view.columns) != (rows.epoch, rows.blocks, rows.columns):
            nodes = self._keys.swarm(swarm)[1]
            blocks = await self._link.command("HGET", nodes, f"z:{self._me.zone}") or b""
            view.near = 0
            for at in range(0, len(blocks), 2):
                last = (int.from_bytes(blocks[at : at + 2], "big") + 1) * 64
                view.near |= ((1 << 64) - 1) << (rows.columns - last) if last <= rows.columns else 0
            view.epoch, view.blocks, view.columns = rows.epoch, rows.blocks, rows.columns
        return view

    async def _answer(self, swarm: Swarm, view: _View, chunks: Sequence[int], rows: Rows) -> Answer:
        counts = dict.fromkeys(chunks, 0)
        chosen: dict[int, list[int]] = {}
        for chunk, start, row in _held(chunks, rows):
            counts[chunk] = row.bit_count() * (rows.columns // rows.width)
            row &= ~_own(start, rows)
            near = view.near >> (rows.columns - start - rows.width) & ((1 << rows.width) - 1)
            chosen[chunk] = [start + column for column in sample(row, near, rows.width, self._random.random)]
        await self._meet(swarm, view, {column for some in chosen.values() for column in some})
        holders = {}
        for chunk, columns in chosen.items():
            if some := tuple([view.owners[c] for c in columns if c in view.owners]):
                holders[chunk] = some
        name = swarm_name(swarm)
        digests = {}
        for chunk, kept in zip(chunks, rows.digests, strict=False):
            if kept is not None and chunk in holders:
                digest = self._seals.unpack_digest(name, chunk, kept)
                if digest is not None:
                    digests[chunk] = digest
        kinds = tuple(zip(chunks, rows.kinds, strict=True))
        return Answer(
            holders,
            tuple([chunk for chunk, kind in kinds if kind == "c"]),
            tuple([chunk for chunk, kind in kinds if kind == "r"]),
            counts,
            digests,
        )

    async def _meet(self, swarm: Swarm, view: _View, columns: set[int]) -> None:
        """Find out the owners of columns that are not known yet."""
        unknown = [column for column in columns if column not in view.owners]
        if not unknown:
            return
        nodes = self._keys.swarm(swarm)[1]
        found = await self._link.command("HMGET", nodes, *(f"s:{column}" for column in unknown))
        for column, record in zip(unknown, found, strict=True):
            if record is not None:
                view.owners[column] = self._ours(unpack_peer, record)

    # Values

    async def add_kin(self, key: str, snapshot_id: str) -> None:
        name = self._keys.kin(key)
        try:
            await self._link.commands(
                ("LREM", name, 0, snapshot_id),
                ("LPUSH", name, snapshot_id),
                ("LTRIM", name, 0, MAX_KIN - 1),
                ("PEXPIRE", name, _milliseconds(KIN_LIFETIME)),
            )
        except TrackerUnavailable as error:
            _log.debug("no kin noted: %s", error)

    async def kin(self, key: str) -> list[str]:
        try:
            found = await self._link.command("LRANGE", self._keys.kin(key), 0, MAX_KIN - 1)
        except TrackerUnavailable as error:
            _log.debug("no kin known: %s", error)
            return []
        return [one.decode(errors="replace") for one in found]

    async def once(self, key: str, max_age: float, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        return await once(self, key, max_age, ask, lease=self._settings.lease)

    async def remember(self, key: str, value: bytes, seconds: float) -> None:
        kept = self._seals.pack(key, value, seconds)
        if kept is None:
            return
        try:
            await self._link.command("SET", self._keys.value(key), kept, "PX", _milliseconds(seconds))
        except TrackerUnavailable as error:
            _log.debug("a value is not remembered: %s", error)

    async def recall(self, key: str) -> bytes | None:
        try:
            found = await self.recall_aged(key)
        except TrackerUnavailable as error:
            _log.debug("a value is not recalled: %s", error)
            return None
        return None if found is None else found[0]

    async def recall_aged(self, key: str) -> tuple[bytes, float] | None:
        """The value, and how many seconds ago it was remembered. Raises TrackerUnavailable."""
        name = self._keys.value(key)
        kept, left = await self._link.commands(("GET", name), ("PTTL", name))
        found = None if kept is None else self._seals.unpack(key, kept)
        return None if found is None else (found[0], max(0.0, found[1] - left / 1000))

    async def lock(self, key: str, token: str, seconds: float) -> bool:
        """Take or keep the right to find out a value. Raises TrackerUnavailable."""
        name = [self._keys.lock(key)]
        return bool(await self._link.run(script("lock"), name, [token, _milliseconds(seconds)]))

    async def unlock(self, key: str, token: str) -> None:
        """Raises TrackerUnavailable."""
        await self._link.run(script("unlock"), [self._keys.lock(key)], [token])

    async def close(self) -> None:
        await self._link.close()

    @property
    def _lifetime(self) -> int:
        return _milliseconds(self._settings.lifetime)

    def _ours(self, read: Callable[[_Packed], _Read], packed: _Packed) -> _Read:
        """Raises TrackerUnavailable for what headrace did not write."""
        try:
            return read(packed)
        except ValueError:
            raise TrackerUnavailable(
                f"the tracker at {self._settings.place} has something under the prefix {self._settings.prefix!r} that "
                f"headrace did not write: choose another prefix, or delete those keys."
            ) from None


def _check(swarm: Swarm, *lists: Iterable[int]) -> None:
    """Raises ValueError for chunks that the swarm does not have: in Redis they would be those of nobody."""
    for chunks in lists:
        for chunk in chunks:
            if not 0 <= chunk < swarm.chunks:
                raise ValueError(f"there is no chunk {chunk} in a swarm of {swarm.chunks}")


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _held(chunks: Sequence[int], rows: Rows) -> list[tuple[int, int, int]]:
    """Chunks that somebody holds, each with the first column of its row's part, and the row."""
    held = [chunk for chunk, kind in zip(chunks, rows.kinds, strict=True) if kind == "h"]
    return list(zip(held, rows.starts, rows.rows, strict=True))


def _own(start: int, rows: Rows) -> int:
    """The bit of the asking node's column in the part of a row that begins with column `start`."""
    at = rows.slot - start
    return 1 << (rows.width - 1 - at) if 0 <= at < rows.width else 0
