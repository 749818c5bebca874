"""Archives (`.tar`, `.tar.gz`): staged as an ordinary object, extracted into a derived snapshot."""

from __future__ import annotations

from headrace.cache.manifest import Manifest
from headrace.cache.snapshot import Selection, Snapshot
from headrace.cache.store import Domain, Store

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def is_archive(manifest: Manifest) -> bool:
    """Whether a snapshot is one archive and nothing else."""
    return len(manifest.files) == 1 and manifest.files[0].path.endswith(SUFFIXES)


def derive(
    store: Store, domain: Domain, snapshot: Snapshot, manifest: Manifest, name: str, selection: Selection
) -> tuple[Snapshot, Manifest]:
    raise NotImplementedError
