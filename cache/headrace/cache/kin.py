"""What other snapshots share with this one, at nodes that hold those: how a new revision moves only what changed.

Kin are the last few snapshots of the same address, and the predecessor that a published manifest names. A chunk is
the same where its object is (the same content, cut alike) or where its published digest is. Only chunks that
nobody in the swarm of this snapshot holds are looked for here.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.cache import manifest as manifests
from headrace.cache.cluster import Cluster
from headrace.cache.digest import identity
from headrace.cache.errors import ClusterError, HeadraceError, IntegrityError, NotStaged
from headrace.cache.manifest import Manifest
from headrace.cache.numbering import Numbering
from headrace.cache.store import Domain
from headrace.cache.tracker.protocol import MAX_WANTED, Peer, Swarm

_REMEMBERED = 7 * 86400.0
_MOST_REMEMBERED = 16 << 20
_BELIEVED = 2.0
_PATIENCE = 10.0
_ASKED = 3
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Place:
    """A chunk of another snapshot: `number` in its swarm, `index` in its object."""

    swarm: Swarm
    number: int
    object_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Found:
    """Where such a chunk is.

    Attributes:
        digest: that a node learned of it; None: unknown.
    """

    place: Place
    holders: tuple[Peer, ...]
    digest: bytes | None


class Kin:
    """The kin of one snapshot."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._places: dict[int, Place] = {}
        self._found: dict[int, tuple[Found | None, float]] = {}
        self._failed: set[int] = set()

    @staticmethod
    async def open(
        cluster: Cluster, domain: Domain, manifest: Manifest, numbering: Numbering, absent: Iterable[int]
    ) -> Kin:
        """Find the kin that share any of the absent chunks. Nothing of it is needed, so nothing is an error."""
        kin = Kin(cluster)
        missing = set(absent)
        own = manifest.snapshot_id(domain.name)
        try:
            async with asyncio.timeout(_PATIENCE):
                for snapshot_id in await _relatives(cluster, domain.name, manifest):
                    if snapshot_id == own or not missing:
                        continue
                    other = await _manifest(cluster, domain, snapshot_id)
                    if other is not None:
                        places = _places(domain.name, manifest, numbering, other, missing)
                        missing.difference_update(places)
                        kin._places.update(places)
        except TimeoutError:
            pass  # what was found until then counts
        return kin

    def has(self, number: int) -> bool:
        """Whether a chunk may be found so."""
        return number in self._places and number not in self._failed

    def failed(self, number: int) -> None:
        """It could not be had so: it is looked for no more."""
        self._failed.add(number)

    async def find(self, number: int) -> Found | None:
        """Who has such a chunk, under which name; None: nobody.

        Raises:
            TrackerUnavailable: nobody could be asked.
        """
        now = time.monotonic()
        known = self._found.get(number)
        if known is None or known[1] < now - _BELIEVED:
            await self._look(number, now)
            known = self._found[number]
        return known[0]

    async def _look(self, number: int, now: float) -> None:
        """Ask about a chunk, and in the same breath about those that will be next."""
        swarm = self._places[number].swarm
        old = now - _BELIEVED
        ahead = [
            other
            for other, place in self._places.items()
            if other > number
            and place.swarm == swarm
            and other not in self._failed
            and self._found.get(other, (None, 0.0))[1] < old
        ]
        batch = [number, *ahead[: MAX_WANTED - 1]]
        answer = await self._cluster.tracker.look(swarm, [self._places[n].number for n in batch])
        for one in batch:
            place = self._places[one]
            holders = answer.holders.get(place.number, ())
            found = Found(place, holders, answer.digests.get(place.number)) if holders else None
            self._found[one] = found, now


async def remember(cluster: Cluster, domain: str, manifest: Manifest) -> None:
    """Let other nodes know of a snapshot, so that it can be kin of others."""
    tracker, snapshot_id = cluster.tracker, manifest.snapshot_id(domain)
    stored = manifest.to_stored()
    if len(stored) <= _MOST_REMEMBERED:
        await tracker.remember(_manifest_key(domain, snapshot_id), stored, _REMEMBERED)
    if manifest.published:
        await tracker.remember(_digest_key(domain, manifest.digest), snapshot_id.encode(), _REMEMBERED)
    await tracker.add_kin(_address_key(domain, manifest), snapshot_id)


async def _relatives(cluster: Cluster, domain: str, manifest: Manifest) -> list[str]:
    found = []
    if manifest.predecessor is not None:
        named = await cluster.tracker.recall(_digest_key(domain, manifest.predecessor))
        if named is not None:
            found.append(named.decode(errors="replace"))
    found += await cluster.tracker.kin(_address_key(domain, manifest))
    # An id becomes a path: what others say is not taken for one unseen.
    return [one for one in dict.fromkeys(found) if _ID.fullmatch(one)]


async def _manifest(cluster: Cluster, domain: Domain, snapshot_id: str) -> Manifest | None:
    """A snapshot's manifest: from this store, the tracker, or a node that has it."""
    try:
        return domain.snapshot(snapshot_id).manifest()
    except (NotStaged, IntegrityError):
        pass  # not here, or damaged: others may have it
    remembered = await cluster.tracker.recall(_manifest_key(domain.name, snapshot_id))
    if remembered is not None:
        return _parsed(remembered, domain.name, snapshot_id)
    try:
        members = [peer for peer in await cluster.tracker.members() if peer.id != cluster.me.id]
    except ClusterError:
        return None
    for peer in members[:_ASKED]:
        try:
            data = await cluster.client.manifest(peer, domain.name, snapshot_id)
        except ClusterError:
            continue
        if (parsed := _parsed(data, domain.name, snapshot_id)) is not None:
            return parsed
    return None


def _parsed(data: bytes, domain: str, snapshot_id: str) -> Manifest | None:
    try:
        found = manifests.parse(data, f"another node's manifest of {snapshot_id[:12]}")
        return found if found.snapshot_id(domain) == snapshot_id else None
    except HeadraceError:
        return None


def _places(
    domain: str, manifest: Manifest, numbering: Numbering, other: Manifest, missing: set[int]
) -> dict[int, Place]:
    """Where the missing chunks are in another snapshot."""
    theirs = Numbering.of(other, domain)
    swarm = Swarm(other.snapshot_id(domain), theirs.chunks)
    by_digest: dict[tuple[int, str], Place] = {}
    if other.algorithm == manifest.algorithm:
        for at, file in enumerate(theirs.files):
            for index, digest in enumerate(file.chunks or ()):
                place = Place(swarm, theirs.number(at, index), theirs.ids[at], index)
                by_digest.setdefault((file.grid.lengths[index], digest), place)
    found: dict[int, Place] = {}
    for number in sorted(missing):
        at, index = numbering.locate(number)
        file, object_id = numbering.files[at], numbering.ids[at]
        same = theirs.positions.get(object_id)
        if same is not None:
            found[number] = Place(swarm, theirs.number(same, index), object_id, index)
        elif file.chunks is not None:
            elsewhere = by_digest.get((file.grid.lengths[index], file.chunks[index]))
            if elsewhere is not None:
                found[number] = elsewhere
    return found


def _address_key(domain: str, manifest: Manifest) -> str:
    return identity("kin", domain, manifest.uri or "")


def _manifest_key(domain: str, snapshot_id: str) -> str:
    return identity("manifest", domain, snapshot_id)


def _digest_key(domain: str, digest: str) -> str:
    return identity("manifest digest", domain, digest)
