"""What a new revision can take over from the one before it, said to the user where it is little."""

from __future__ import annotations

from headrace.cache.archive import is_archive
from headrace.cache.errors import IntegrityError, NotStaged
from headrace.cache.manifest import Manifest
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain


def note(domain: Domain, name: str, previous: Snapshot | None, manifest: Manifest) -> str | None:
    """A sentence where a new revision moves more than what changed, else None.

    Args:
        name: what the user calls it.
        previous: what the same reference resolved to before.
        manifest: of the new revision.
    """
    if is_archive(manifest):
        return None
    if manifest.published:
        before = _predecessor(domain, manifest) if previous is None else _manifest(previous)
        return None if before is None else _resharded(name, before, manifest)
    if previous is None or previous.id == manifest.snapshot_id(domain.name):
        return None
    return (
        f"{name} changed and has no published chunk digests, so changed files are fetched whole: "
        f"`headrace publish` makes new revisions move only what changed."
    )


def _predecessor(domain: Domain, manifest: Manifest) -> Manifest | None:
    """The manifest of this domain that a new one names as its predecessor, wherever it came from."""
    if manifest.predecessor is None:
        return None
    stored = (_manifest(snapshot) for snapshot in domain.snapshots())
    return next((m for m in stored if m is not None and m.digest == manifest.predecessor), None)


def _manifest(snapshot: Snapshot) -> Manifest | None:
    try:
        return snapshot.manifest()
    except (NotStaged, IntegrityError):
        # Evicted meanwhile, or damaged: nothing can be said about it, and `verify` is who reports it.
        return None


def _resharded(name: str, before: Manifest, after: Manifest) -> str | None:
    """Packed small tensors and chunk boundaries do not survive another division into files."""
    old, new = ({f.path for f in m.files if f.path.endswith(".safetensors")} for m in (before, after))
    if old == new or not old or not new:
        return None
    return (
        f"{name} is sharded differently from the revision before ({len(new)} files, before {len(old)}): "
        f"large tensors are found here by their digests, small ones are fetched again."
    )
