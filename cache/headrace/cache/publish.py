"""Publishing: a folder uploaded with the manifest that lets every node verify it from the first byte.

Order: every safetensors header is checked; each file is read once for its digests, and uploaded; the
origin's listing is compared; last of all, and atomically, `headrace.manifest.json` is written.

Every file is uploaded each time. An equal size in the listing would not prove that what lies there is
what an earlier manifest describes, and reading it back costs as much as writing it. The one exception
is a folder that is published where it lies: there only the manifest is written.

Crash story. Until the manifest is written, the old one (or none) describes the URI. Where files of the
old revision were already overwritten, readers of it stop with `OriginChanged`, or find that a digest
does not match; they never see a mixture. Publishing again completes the new revision. Two publishers
at one URI at once: the last manifest wins, and where it does not fit, staging says so. A prefix of its
own for each revision (s3://models/name/2025-06-01) avoids all of this, and costs nothing on the nodes:
chunks are found again by their digests, whatever the URI.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.cache import config, manifest, selection, signature
from headrace.cache.describe import describe
from headrace.cache.digest import XXH3, hasher
from headrace.cache.errors import Interrupted, NotFound, OriginChanged, UsageError
from headrace.cache.grid import DEFAULT_CHUNK, check_chunk_size
from headrace.cache.manifest import PUBLISHED_NAME, Manifest, ManifestFile
from headrace.cache.origins import Origin, OriginOptions, open_origin
from headrace.cache.paths import check_size, check_tree
from headrace.cache.progress import Progress
from headrace.cache.reference import Reference, parse
from headrace.cache.safetensors import read_header
from headrace.cache.selection import Skipped
from headrace.cache.snapshot import Selection

AUTO = "auto"
_AT_ONCE = 4
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What was published.

    Attributes:
        uri: canonical.
        digest: the manifest's own, which the next revision names as its predecessor.
        bytes: of all files; `uploaded` of those that were sent.
        skipped: files of the folder that are no part of it, and why.
        leftover: files at the URI that the manifest does not name, such as shards of an old revision.
        key: the public key (hex) that signed, or None.
    """

    uri: str
    digest: str
    files: int
    bytes: int
    uploaded: int
    skipped: tuple[Skipped, ...]
    leftover: tuple[str, ...]
    predecessor: str | None
    seconds: float
    key: str | None = None


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes when a file on disk is written or replaced."""

    modified: int
    size: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> _Stamp:
        return _Stamp(status.st_mtime_ns, status.st_size, status.st_ino)


@dataclass(frozen=True, slots=True)
class _LocalFile:
    """A file to publish, as it was when the folder was listed."""

    path: str
    file: Path
    stamp: _Stamp


@dataclass(frozen=True, slots=True)
class _Request:
    folder: Path
    reference: Reference
    chunk: int
    algorithm: str
    sign: Path | None
    predecessor: str | None
    wanted: Selection


def publish(
    folder: str | os.PathLike[str],
    uri: str,
    *,
    chunk: int = DEFAULT_CHUNK,
    algorithm: str = XXH3,
    sign: Path | None = None,
    predecessor: str | None = AUTO,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    options: OriginOptions | None = None,
    progress: Progress | None = None,
) -> PublishReport:
    """Upload a folder, and the manifest that describes it.

    Args:
        folder: a local folder; symbolic links in it may not lead out of it.
        chunk: the largest chunk, in bytes.
        algorithm: of the chunk digests: "xxh3-128" or "blake3".
        sign: PEM file with the Ed25519 private key to sign with.
        predecessor: digest of the manifest that this revision follows; "auto" takes what is at `uri` now.
        include: glob patterns of the files to take; () takes all but .git and caches.
        ignore: glob patterns of files to leave out.
        progress: counts what is uploaded, as "local".

    Raises:
        UsageError: nothing to publish, an unusable key, or an origin that cannot be written.
        CheckpointError: a file is called safetensors and is not; nothing was uploaded.
        UnsafePath: paths that no node could stage; nothing was uploaded.
        OriginChanged: a file changed meanwhile, here or at the origin; no manifest was written.
        OriginError: the origin refused.
    """
    reference = parse(uri)
    check_chunk_size(chunk)
    hasher(algorithm)
    if predecessor not in (AUTO, None) and not _DIGEST.fullmatch(predecessor or ""):
        raise UsageError(
            f"the predecessor {predecessor!r} is no manifest digest: use sha256: and 64 hex digits, or auto."
        )
    if sign is not None:
        # An unusable key shows before hours of upload.
        signature.sign(Manifest(()), sign)
    wanted = Selection(tuple(include) or ("*",), (*ignore, *(() if include else selection.NEVER)))
    request = _Request(Path(os.path.abspath(folder)), reference, chunk, algorithm, sign, predecessor, wanted)
    chosen = options or config.load().options(reference)
    try:
        return asyncio.run(_publish(request, chosen, progress or Progress()))
    except KeyboardInterrupt:
        raise Interrupted(
            f"publishing was interrupted and no manifest was written: publish to {reference.uri} again."
        ) from None


async def _publish(request: _Request, options: OriginOptions, progress: Progress) -> PublishReport:
    in_place = _in_place(request)
    files, skipped = await _list_folder(request)
    await asyncio.to_thread(_check_headers, files)
    origin = open_origin(request.reference, options)
    try:
        current = await _current(origin) if request.predecessor == AUTO else None
        progress.total = 0 if in_place else sum(f.stamp.size for f in files)
        progress.phase = "publishing"
        entries = await _send(files, request, None if in_place else origin, progress)
        for file in files:
            _check_unchanged(file, _stat(file))
        leftover = await _check_arrived(origin, entries)
        result = _compose(entries, request, current)
        await origin.put_bytes(PUBLISHED_NAME, result.to_published())
    finally:
        await origin.close()
    progress.phase = "published"
    return PublishReport(
        origin.uri,
        result.digest,
        len(entries),
        result.size,
        0 if in_place else result.size,
        skipped,
        leftover,
        result.predecessor,
        progress.seconds,
        result.signatures[-1].key if request.sign is not None else None,
    )


def _in_place(request: _Request) -> bool:
    """Whether the folder is published where it lies."""
    if request.reference.scheme != "file":
        return False
    source, target = os.path.realpath(request.folder), os.path.realpath(request.reference.location)
    if target.startswith(f"{source}/"):
        raise UsageError(
            f"{request.reference.uri} lies inside the folder that is published: choose a place beside it."
        )
    return source == target


async def _list_folder(request: _Request) -> tuple[list[_LocalFile], tuple[Skipped, ...]]:
    """The files to publish, sorted; the folder is read as the origin that it could be."""
    local = open_origin(Reference("file", str(request.folder)))
    try:
        listing = await local.list()
    finally:
        await local.close()
    if listing.single:
        raise UsageError(f"{str(request.folder)!r} is a file: publish the folder that holds the model.")
    kept, skipped = selection.select([(f.path, f.size) for f in listing.files], request.wanted)
    if not kept:
        raise UsageError(f"{str(request.folder)!r} holds nothing to publish: check the patterns.")
    check_tree(kept, f"the folder {str(request.folder)!r}")
    files = []
    for path in sorted(kept):
        file = request.folder / path
        try:
            stamp = _Stamp.of(os.stat(file))
        except OSError as error:
            raise UsageError(f"{str(file)!r} cannot be read ({error.strerror}): check the folder.") from None
        check_size(path, stamp.size, f"the folder {str(request.folder)!r}")
        files.append(_LocalFile(path, file, stamp))
    return files, tuple(skipped)


def _check_headers(files: Sequence[_LocalFile]) -> None:
    for file in files:
        if file.path.endswith(".safetensors"):
            read_header(file.file)


async def _current(origin: Origin) -> Manifest | None:
    """The manifest that is at the URI now."""
    data = await origin.fetch(PUBLISHED_NAME, manifest.MAX_BYTES)
    return None if data is None else manifest.parse(data, f"{origin.uri}/{PUBLISHED_NAME}")


async def _send(
    files: Sequence[_LocalFile], request: _Request, origin: Origin | None, progress: Progress
) -> tuple[ManifestFile, ...]:
    """Digest and upload every file, several at once; the entries, sorted by path."""
    gate = asyncio.Semaphore(_AT_ONCE)
    stop = threading.Event()

    async def one(file: _LocalFile) -> ManifestFile:
        async with gate:
            entry = await asyncio.to_thread(_describe, file, request, stop)
            if origin is not None:
                await origin.put(file.path, str(file.file))
                progress.add("local", entry.size, len(entry.grid))
            _check_unchanged(file, _stat(file))
            return entry

    # The smallest goes alone: an origin that cannot be written says so before a model was hashed.
    ordered = sorted(files, key=lambda f: f.stamp.size)
    tasks: list[asyncio.Future[ManifestFile]] = []
    try:
        for batch in (ordered[:1], ordered[1:]):
            started = [asyncio.ensure_future(one(file)) for file in batch]
            tasks += started
            await asyncio.gather(*started)
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(sorted((task.result() for task in tasks), key=lambda entry: entry.path))


def _describe(file: _LocalFile, request: _Request, stop: threading.Event) -> ManifestFile:
    def check() -> None:
        if stop.is_set():
            raise Interrupted("publishing was stopped; no manifest was written.")

    try:
        fd = os.open(file.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check_unchanged(file, os.fstat(fd))
            entry = describe(
                fd,
                file.path,
                where=str(file.file),
                chunk=request.chunk,
                algorithm=request.algorithm,
                check=check,
            )
            _check_unchanged(file, os.fstat(fd))
            return entry
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(f"{str(file.file)!r} cannot be read ({error.strerror}): check the folder.") from None


def _stat(file: _LocalFile) -> os.stat_result | None:
    try:
        return os.stat(file.file)
    except OSError:
        return None


def _check_unchanged(file: _LocalFile, status: os.stat_result | None) -> None:
    if status is None or _Stamp.of(status) != file.stamp:
        raise OriginChanged(
            f"{str(file.file)!r} changed while it was published, so no manifest was written: "
            f"let its writer finish, then publish again."
        )


async def _check_arrived(origin: Origin, entries: Sequence[ManifestFile]) -> tuple[str, ...]:
    """Compare the listing with what was sent; the files that are there besides."""
    listed = {f.path: f.size for f in (await origin.list()).files}
    for entry in entries:
        if entry.path not in listed:
            raise NotFound(
                f"{origin.uri} does not list {entry.path!r} after its upload, so no manifest was written: "
                f"look for a rule that removes it, then publish again."
            )
        if listed[entry.path] != entry.size:
            raise OriginChanged(
                f"{origin.uri}/{entry.path} has {listed[entry.path]} bytes instead of the {entry.size} uploaded, so "
                f"no manifest was written: somebody else writes there too; publish again."
            )
    named = {PUBLISHED_NAME, *(e.path for e in entries)}
    return tuple(sorted(set(listed) - named))


def _compose(entries: tuple[ManifestFile, ...], request: _Request, current: Manifest | None) -> Manifest:
    """The manifest to write. The same files again give the same manifest, with its signatures."""
    if current is not None and (current.files, current.algorithm) == (entries, request.algorithm):
        result = current
    else:
        found = None if current is None else current.digest
        named = found if request.predecessor == AUTO else request.predecessor
        result = Manifest(entries, request.algorithm, published=True, predecessor=named)
    if request.sign is not None:
        # The newest signature stands last, also where the key had signed before.
        result = signature.sign(result, request.sign)
    return replace(result, uri=None, revision=None)
