"""Before staging: what the reference points to now, and the snapshot that stands for it.

What a reference pointed to is remembered in the store and believed for as long as `revalidate` says;
a revision that can never change needs no question at all. With the origin down, what is staged serves.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from headrace.cache import config, signature, succession
from headrace.cache.config import Config
from headrace.cache.digest import XXH3
from headrace.cache.errors import HeadraceError, NotStaged, OriginMisconfigured, OriginUnavailable
from headrace.cache.grid import DEFAULT_CHUNK
from headrace.cache.manifest import Manifest
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin
from headrace.cache.progress import Progress
from headrace.cache.reference import Reference
from headrace.cache.resolve import Requirement, Resolution, resolve
from headrace.cache.selection import Skipped
from headrace.cache.snapshot import Selection, Snapshot
from headrace.cache.stager import StagerLimits
from headrace.cache.store import Domain, Store

if TYPE_CHECKING:
    from headrace.cache.cluster import Cluster
    from headrace.cache.resolution import SharedResolution

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_HOLD_TRIES = 10


@dataclass(frozen=True, slots=True)
class StageRequest:
    """What to stage, and how. None stands for what the configuration says.

    Attributes:
        reference: as the user typed it.
        name: what it is to be remembered as, if not by its reference.
        workers: processes, this one included; 0 by cores and size.
    """

    reference: str
    root: str | None = None
    domain: str | None = None
    selection: Selection = field(default_factory=Selection)
    revalidate: str | None = None
    require: str | None = None
    keys: tuple[str, ...] = ()
    workers: int | None = None
    chunk: int = DEFAULT_CHUNK
    algorithm: str = XXH3
    options: OriginOptions | None = None
    limits: StagerLimits = field(default_factory=StagerLimits)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A snapshot, held until `close`, and how to fill it.

    Attributes:
        name: the reference it is remembered by.
        headers: bytes already read from the origin (see `Resolution`).
        hold: descriptor that keeps the snapshot from eviction.
    """

    snapshot: Snapshot
    manifest: Manifest
    name: str
    hold: int
    skipped: tuple[Skipped, ...] = ()
    headers: dict[str, bytes] = field(default_factory=dict)

    def close(self) -> None:
        os.close(self.hold)


async def prepare(
    domain: Domain,
    store: Store,
    request: StageRequest,
    settings: Config,
    reference: Reference,
    origin: Origin,
    progress: Progress,
    *,
    cluster: Cluster | None = None,
    options: OriginOptions | None = None,
) -> Prepared:
    """Decide which snapshot a request means, and make its folder.

    Args:
        cluster: asks the origin once for all its nodes; None: this node asks for itself.
        options: of the origin.

    Raises:
        HeadraceError: the origin refuses, or offers less than is required.
    """
    name = request.name or str(reference)
    requirement = _requirement(request, settings, reference)
    age = config.max_age(request.revalidate or settings.revalidate)
    remembered = domain.resolved(name, request.selection)
    if remembered is not None:
        snapshot, resolved = remembered
        fresh = age is None or time.time() - resolved.resolved <= age or _immutable(reference)
        if fresh and _satisfies(snapshot, requirement):
            hold = snapshot.hold()
            if hold is not None:
                return Prepared(snapshot, snapshot.manifest(), name, hold)
    elif age is None:
        progress.note(f"{name} was never resolved here, so the origin is asked once.")

    async def ask() -> Resolution:
        return await resolve(
            origin,
            request.selection,
            chunk=request.chunk,
            algorithm=request.algorithm,
            requirement=requirement,
            known=lambda plain: _stored(domain, plain),
        )

    shared = None if cluster is None else _shared(cluster, domain, request, requirement, reference, options)
    asked = time.time()
    try:
        if shared is None:
            resolution = await ask()
        else:
            agreed = await shared.once(None if _immutable(reference) else age, ask, progress)
            resolution, asked = agreed.resolution, agreed.resolved
    except (OriginUnavailable, OriginMisconfigured) as error:
        staged = domain.resolved(name, request.selection, complete=True)
        hold = staged[0].hold() if staged is not None and _satisfies(staged[0], requirement) else None
        if staged is not None and hold is not None:
            progress.note(f"the origin cannot be reached ({error}), so {name} is served as staged earlier.")
            return Prepared(staged[0], staged[0].manifest(), name, hold)
        last = None if shared is None else await shared.last()
        if last is None:
            raise
        progress.note(
            f"the origin cannot be reached ({error}), so {name} is staged from other nodes, as they last found it."
        )
        resolution, asked = last.resolution, last.resolved
    return _make(domain, store, request, name, resolution, asked, progress)


def _shared(
    cluster: Cluster,
    domain: Domain,
    request: StageRequest,
    requirement: Requirement,
    reference: Reference,
    options: OriginOptions | None,
) -> SharedResolution:
    """The cluster's answer to this request: the same for all who would ask the origin the same."""
    # Alone, nothing of the cluster is imported.
    from headrace.cache.resolution import SharedResolution

    endpoint = (options.endpoint if options is not None else None) or ""
    key = (
        *(reference.scheme, reference.location, reference.revision or "", endpoint),
        *("include", *request.selection.include, "ignore", *request.selection.ignore),
        *(str(request.chunk), request.algorithm),
    )
    return SharedResolution(cluster, domain.name, key, requirement)


def _make(
    domain: Domain,
    store: Store,
    request: StageRequest,
    name: str,
    resolution: Resolution,
    resolved: float,
    progress: Progress,
) -> Prepared:
    manifest = resolution.manifest
    previous = domain.resolved(name, request.selection)
    said = succession.note(domain, name, None if previous is None else previous[0], manifest)
    if said is not None:
        progress.note(said)
    for _ in range(_HOLD_TRIES):
        snapshot = domain.make_snapshot(manifest, store.tmp)
        hold = snapshot.hold()
        if hold is not None:
            break
    else:
        raise NotStaged(
            f"{name} is being evicted again and again while it is staged: stop `headrace gc` meanwhile."
        )
    stored = snapshot.manifest()
    if stored.canonical() == manifest.canonical():
        # The same revision from elsewhere, unsigned there: what is known of it is not forgotten.
        signatures = tuple(dict.fromkeys((*manifest.signatures, *stored.signatures)))
        manifest = replace(manifest, signatures=signatures, signed_by=manifest.signed_by or stored.signed_by)
    if stored != manifest and (manifest.published or not stored.published):
        snapshot.replace_manifest(manifest)
    else:
        manifest = stored
    snapshot.add_name(name, request.selection, resolved)
    return Prepared(snapshot, manifest, name, hold, resolution.skipped, resolution.headers)


def _requirement(request: StageRequest, settings: Config, reference: Reference) -> Requirement:
    """What the configuration requires of the origin; a request may only ask for more."""
    rule = settings.rule(reference).requirement
    level = "signed" if "signed" in (rule.level, request.require) else request.require or rule.level
    keys = tuple(signature.public_key(k) for k in request.keys) or rule.keys
    return Requirement(level, keys)


def _satisfies(snapshot: Snapshot, requirement: Requirement) -> bool:
    if requirement.level is None:
        return True
    try:
        manifest = snapshot.manifest()
        if requirement.level == "signed" and manifest.signed_by not in requirement.keys:
            signature.verify(manifest, requirement.keys, snapshot.id)
    except HeadraceError:
        return False
    return manifest.published


def _immutable(reference: Reference) -> bool:
    return (
        reference.scheme == "hf"
        and reference.revision is not None
        and bool(_COMMIT.match(reference.revision))
    )


def _stored(domain: Domain, plain: Manifest) -> Manifest | None:
    """The manifest of the same snapshot, if this store has it, with the pins of now."""
    snapshot = domain.snapshot(plain.snapshot_id(domain.name))
    try:
        stored = snapshot.manifest()
    except NotStaged:
        return None
    pins = {f.path: f.pin for f in plain.files if f.pin is not None}
    return stored.pinned(pins, plain.uri or "", plain.revision)
