"""What a store holds, in the form that `ls`, `show` and the agent list it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.cache.archive import DERIVED
from headrace.cache.chunkmap import ChunkMap
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain


@dataclass(frozen=True, slots=True)
class Entry:
    """One snapshot.

    Attributes:
        present: bytes that are there and verified; of an object that is filling, by its map.
        references: what resolved to it, latest first.
        last_used: seconds since the epoch; 0.0 when never.
    """

    snapshot: str
    path: str
    references: tuple[str, ...]
    files: int
    bytes: int
    present: int
    staged: bool
    published: bool
    signed: bool
    pinned: str | None
    last_used: float

    def as_json(self) -> dict[str, Any]:
        return {
            "snapshot": self.snapshot,
            "path": self.path,
            "references": list(self.references),
            "files": self.files,
            "bytes": self.bytes,
            "present": self.present,
            "staged": self.staged,
            "published": self.published,
            "signed": self.signed,
            "pinned": self.pinned,
            "last_used": self.last_used,
        }


def entry(domain: Domain, snapshot: Snapshot) -> Entry:
    """What there is to say of one snapshot. Raises NotStaged when it has gone meanwhile."""
    manifest = snapshot.manifest()
    staged = snapshot.complete
    # By which archive a snapshot is found again is no reference that anyone typed.
    typed = (name for name in snapshot.names() if not name.reference.startswith(DERIVED))
    names = sorted(typed, key=lambda name: -name.resolved)
    return Entry(
        snapshot=snapshot.id,
        path=str(snapshot.files),
        references=tuple(dict.fromkeys(name.reference for name in names)),
        files=len(manifest.files),
        bytes=manifest.size,
        present=manifest.size if staged else sum(present_bytes(domain, manifest, f) for f in manifest.files),
        staged=staged,
        published=manifest.published,
        signed=bool(manifest.signatures) or manifest.signed_by is not None,
        pinned=snapshot.pinned,
        last_used=snapshot.last_used,
    )


def present_bytes(domain: Domain, manifest: Manifest, file: ManifestFile) -> int:
    """Bytes of a file that are in the store and verified; 0 where this user may not read the map."""
    folder: ObjectFolder = domain.object(manifest.object_id(domain.name, file))
    if folder.complete:
        return file.size
    try:
        with ChunkMap.open(folder.map, writable=False) as chunks:
            ready = range(len(file.grid.lengths))
            return sum(file.grid.lengths[i] for i in ready if chunks.ready(i, i + 1))
    except (FileNotFoundError, PermissionError):
        return 0
