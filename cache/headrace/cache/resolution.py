"""What a reference points to, found out once per cluster.

One node asks the origin, the others wait for what it finds and keep it as long as they would believe an answer of
their own. The shared value is the manifest in its stored form and what was skipped. Where a signature is required,
every node checks it again; and the origin's bytes are checked against the manifest anyway, or are learned from.

The header bytes that were read on the way stay with the node that asked. It claims their chunks before anyone
knows of the swarm, so that nobody reads them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from headrace.cache import kin, signature
from headrace.cache import manifest as manifests
from headrace.cache.cluster import Cluster
from headrace.cache.digest import identity
from headrace.cache.errors import HeadraceError, ManifestError, TrackerUnavailable
from headrace.cache.manifest import Manifest
from headrace.cache.numbering import Numbering
from headrace.cache.progress import Progress
from headrace.cache.resolve import Requirement, Resolution
from headrace.cache.selection import Skipped
from headrace.cache.tracker.protocol import MAX_WANTED, Exchange, Swarm

_FOR_EVER = 365 * 86400.0
_REMEMBERED = 7 * 86400.0
_MOST = 16 << 20
_WHERE = "what another node of the cluster found"


@dataclass(frozen=True, slots=True)
class Agreed:
    """An answer of the cluster.

    Attributes:
        resolved: when the origin was asked (seconds since the epoch, by the clock of the node that did).
    """

    resolution: Resolution
    resolved: float


class SharedResolution:
    """The way of one request to the cluster's answer."""

    def __init__(self, cluster: Cluster, domain: str, key: tuple[str, ...], requirement: Requirement) -> None:
        """
        Args:
            key: everything that the answer depends on.
        """
        self._cluster = cluster
        self._domain = domain
        self._key = identity("resolution", domain, requirement.level or "", *requirement.keys, "", *key)
        self._requirement = requirement

    async def once(
        self, age: float | None, ask: Callable[[], Awaitable[Resolution]], progress: Progress
    ) -> Agreed:
        """The cluster's answer, or the origin's by this node.

        Args:
            age: seconds for which an answer is believed; None: for ever.

        Raises:
            HeadraceError: what `ask` raises.
        """
        if age is None or age > self._cluster.grace:
            # Who asked may have believed its answer for a shorter time, after which it is no longer waited for.
            last = await self.last()
            if last is not None and (age is None or time.time() - last.resolved <= age):
                return last
        own: list[Agreed] = []

        async def find() -> bytes:
            agreed = Agreed(await ask(), time.time())
            own.append(agreed)
            await self._share_headers(agreed.resolution)
            await kin.remember(self._cluster, self._domain, agreed.resolution.manifest)
            value = _encode(agreed)
            if len(value) <= _MOST:
                await self._cluster.tracker.remember(f"{self._key} last", value, _REMEMBERED)
            return value

        max_age = _FOR_EVER if age is None else max(age, self._cluster.grace)
        value = await self._cluster.tracker.once(self._key, max_age, find)
        if own:
            return own[0]
        try:
            return self._decode(value)
        except HeadraceError as error:
            progress.note(f"the cluster's answer is of no use, so the origin is asked again: {error}")
            return Agreed(await ask(), time.time())

    async def last(self) -> Agreed | None:
        """What the cluster found out last, however long ago; None where that is not known or not enough."""
        value = await self._cluster.tracker.recall(f"{self._key} last")
        if value is None:
            return None
        with suppress(HeadraceError):
            return self._decode(value)
        return None

    async def _share_headers(self, resolution: Resolution) -> None:
        manifest = resolution.manifest
        numbering = Numbering.of(manifest, self._domain)
        chunks = [
            numbering.number(at, index)
            for at, file in enumerate(numbering.files)
            if file.chunks is None
            for index in range(whole_chunks(file.grid.offsets, resolution.headers.get(file.path, b"")))
        ]
        swarm = Swarm(manifest.snapshot_id(self._domain), numbering.chunks)
        with suppress(TrackerUnavailable):  # then they are read twice, at worst
            for start in range(0, len(chunks), MAX_WANTED):
                batch = tuple(chunks[start : start + MAX_WANTED])
                await self._cluster.tracker.exchange(swarm, Exchange(wanted=batch, claims=len(batch)))

    def _decode(self, value: bytes) -> Agreed:
        """
        Raises:
            ManifestError, SignatureError: it is not what is required.
        """
        try:
            top = json.loads(value)
            manifest = manifests.parse(top["manifest"].encode(), _WHERE)
            skipped = tuple(Skipped(**one) for one in top["skipped"])
            whole = None if top["whole"] is None else manifests.parse(top["whole"].encode(), _WHERE)
            resolved = min(float(top["resolved"]), time.time())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{_WHERE} is malformed ({error}).") from None
        if self._requirement.level is not None and not manifest.published:
            raise ManifestError(f"{_WHERE} is not a published manifest.")
        if self._requirement.level == "signed":
            manifest = _verified(manifest, whole, self._requirement)
        else:
            manifest = replace(manifest, signed_by=None)
        return Agreed(Resolution(manifest, skipped, {}), resolved)


def whole_chunks(offsets: tuple[int, ...], head: bytes) -> int:
    """How many chunks of a file its first bytes cover whole."""
    return sum(1 for end in offsets[1:] if end <= len(head))


def _verified(manifest: Manifest, whole: Manifest | None, requirement: Requirement) -> Manifest:
    """The manifest, signed: itself, or all of the whole one that it is a selection of."""
    signed = manifest if whole is None else whole
    key = signature.verify(signed, requirement.keys, _WHERE)
    if whole is not None:
        known = whole.by_path
        plain = (replace(file, pin=None) for file in manifest.files)
        same = manifest.algorithm == whole.algorithm and manifest.predecessor == whole.predecessor
        if not same or any(known.get(file.path) != file for file in plain):
            raise ManifestError(f"{_WHERE} is not a selection of what was signed.")
    return replace(manifest, signed_by=key)


def _encode(agreed: Agreed) -> bytes:
    found = agreed.resolution
    value = {
        "manifest": found.manifest.to_stored().decode(),
        "whole": None if found.whole is None else found.whole.to_published().decode(),
        "skipped": [asdict(s) for s in found.skipped],
        "resolved": agreed.resolved,
    }
    return json.dumps(value).encode()
