"""Rebuild: make an object again whose folder is missing or damaged as a whole.

Its bytes may still be there, as its own `data` or as a snapshot's link: what has its digests is linked
into a new folder, so that links and readers keep their inode. Else the stager fetches it.

Crash story. The damaged folder goes to the trash first: a crash leaves the object missing, its links
intact, and the next repair does the same again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headrace.cache import config
from headrace.cache import object as objects
from headrace.cache.archive import DERIVED
from headrace.cache.errors import NotFound, StoreError
from headrace.cache.manifest import Manifest, ManifestFile
from headrace.cache.object import ObjectFolder, ObjectSpec
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.progress import Progress
from headrace.cache.salvage import origin_reference
from headrace.cache.snapshot import Snapshot, link_or_copy
from headrace.cache.stager import Stager
from headrace.cache.store import Domain, Store
from headrace.cache.verify import chunk_digests, known_digests, sha256_of


async def rebuild(
    store: Store, domain: Domain, snapshot: Snapshot, paths: set[str], options: OriginOptions | None
) -> None:
    """Make the objects of `paths` again, from this disk or from the origin.

    Raises:
        Held: one of them is being staged.
        OriginError: the origin has to be read, and refuses.
        NoSpace: says how much is missing.
    """
    content = snapshot.manifest()
    fetch = False
    for path in sorted(paths):
        file = content.by_path[path]
        folder = domain.object(content.object_id(domain.name, file))
        with ThreadPoolExecutor(4, "headrace-rebuild") as pool:
            found = _still_there(domain, content, file, folder, pool)
        if found is None:
            fetch = True
            store.discard(folder)
            continue
        source, digests = found
        link = store.tmp / f"salvaged-{uuid.uuid4().hex}"
        link_or_copy(source, link)
        store.discard(folder)
        key = file.content_key(content.uri, content.algorithm)
        objects.create_complete(
            ObjectSpec(folder.id, key, file.grid, content.algorithm), folder, store.tmp, link, digests
        )
    # What is not complete yet is left to the next `stage`.
    if fetch and snapshot.complete:
        await _fetch(store, domain, snapshot, content, options)


async def _fetch(
    store: Store, domain: Domain, snapshot: Snapshot, content: Manifest, options: OriginOptions | None
) -> None:
    reference = origin_reference(content)
    if any(name.reference.startswith(DERIVED) for name in snapshot.names()):
        raise NotFound(
            f"a file of the snapshot {snapshot.id[:12]}, which came out of an archive, is lost: "
            f"`headrace rm` it, then stage it again."
        )
    if reference is None:
        raise NotFound(
            f"nothing says where the snapshot {snapshot.id[:12]} came from: remove it, and stage it again."
        )
    origin = open_origin(reference, options or config.load().options(reference))
    try:
        await Stager(store, domain, snapshot, content, origin, Progress()).run()
    finally:
        await origin.close()


def _still_there(
    domain: Domain, content: Manifest, file: ManifestFile, folder: ObjectFolder, pool: ThreadPoolExecutor
) -> tuple[Path, list[bytes]] | None:
    """A file on this disk with the object's bytes, hashed, and its chunk digests."""
    try:
        expected = known_digests(folder, file)
    except StoreError:
        expected = [None] * len(file.grid)
    for path in _candidates(domain, folder):
        if not path.exists() or path.stat().st_size != file.size:
            continue
        found = chunk_digests(path, file.grid, content.algorithm, range(len(file.grid)), pool)
        digests = [found[index] for index in range(len(file.grid))]
        if any(k is not None and k != d for k, d in zip(expected, digests, strict=True)):
            continue
        if None in expected and (file.digest is None or sha256_of(path) != file.digest):
            continue
        if all(isinstance(d, bytes) for d in digests):
            return path, [d for d in digests if isinstance(d, bytes)]
    return None


def _candidates(domain: Domain, folder: ObjectFolder) -> Iterator[Path]:
    yield folder.data
    for snapshot in domain.snapshots():
        if snapshot.complete:
            content = snapshot.manifest()
            for file in content.files:
                if content.object_id(domain.name, file) == folder.id:
                    yield snapshot.files / file.path
