"""From a reference to a manifest: published beside the model, or built from the listing.

A built manifest takes sizes and version pins from the listing and the chunk lengths from the
safetensors headers, which are read once and handed on, so that no byte is read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from headrace.cache import grid, manifest, selection, signature
from headrace.cache.digest import XXH3
from headrace.cache.errors import (
    ManifestError,
    NotFound,
    OriginChanged,
    SignatureError,
)
from headrace.cache.manifest import PUBLISHED_NAME, Manifest, ManifestFile
from headrace.cache.origins.protocol import Listing, Origin, OriginFile
from headrace.cache.paths import check_size, check_tree
from headrace.cache.safetensors import PREFIX, header_length, parse_header
from headrace.cache.selection import Skipped
from headrace.cache.snapshot import Selection

_AT_ONCE = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an origin must offer: None, "published" or "signed"; and the trusted keys (hex)."""

    level: str | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a reference points to now.

    Attributes:
        manifest: of the selected files, pinned.
        skipped: files that are not staged, and why.
        headers: bytes already read from the origin: the start of each safetensors file, by path.
        whole: the signed manifest that `manifest` is a selection of, where it is one: what was signed.
    """

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    headers: dict[str, bytes]
    whole: Manifest | None = None


async def resolve(
    origin: Origin,
    wanted: Selection,
    *,
    chunk: int = grid.DEFAULT_CHUNK,
    algorithm: str = XXH3,
    requirement: Requirement | None = None,
    known: Callable[[Manifest], Manifest | None] = lambda _: None,
) -> Resolution:
    """Ask the origin what the reference is now.

    Args:
        known: gives the stored manifest of the same snapshot, if there is one, which saves reading headers.

    Raises:
        NotFound: nothing is there, or the selection leaves nothing.
        ManifestError, SignatureError: a published manifest is missing where required, or does not hold.
        OriginChanged: the files are not those that the manifest describes.
        CheckpointError: a file that is called safetensors is not.
    """
    need = requirement or Requirement()
    where = f"{origin.uri}/{PUBLISHED_NAME}"
    data = await origin.fetch(PUBLISHED_NAME, manifest.MAX_BYTES)
    if data is not None:
        # What only the store's own manifests say does not come from outside.
        plain = replace(manifest.parse(data, where), published=True, uri=None, revision=None, signed_by=None)
        key = signature.verify(plain, need.keys, where) if need.level == "signed" else None
        published = replace(plain, signed_by=key)
        return await _from_published(origin, published, wanted, where)
    if need.level is not None:
        error = SignatureError if need.level == "signed" else ManifestError
        raise error(
            f"{origin.uri} has no {PUBLISHED_NAME}, and its origin requires a {need.level} manifest: "
            f"upload the model with `headrace publish`."
        )
    return await _from_listing(origin, wanted, chunk, algorithm, known)


async def _from_published(origin: Origin, published: Manifest, wanted: Selection, where: str) -> Resolution:
    wanted = selection.outer([f.path for f in published.files], wanted)
    kept, skipped = selection.select([(f.path, f.size) for f in published.files], wanted)
    chosen = set(kept)
    files = tuple(f for f in published.files if f.path in chosen)
    _not_empty(files, origin.uri, skipped)
    listing = await _listing_of(origin, files)
    listed = {f.path: f for f in listing.files}
    for file in files:
        found = listed.get(file.path)
        if found is None:
            raise NotFound(f"{where} names {file.path!r}, which is not there: publish the model again.")
        if found.size != file.size:
            raise OriginChanged(
                f"{origin.uri}/{file.path} has {found.size} bytes, its manifest says {file.size}: "
                f"it changed since it was published, so publish it again."
            )
    # The signature covers the whole manifest: a selection of it keeps none.
    all_of_it = len(files) == len(published.files)
    signatures = published.signatures if all_of_it else ()
    whole = published if published.signatures and not all_of_it else None
    pins = {path: f.pin for path, f in listed.items()}
    chosen_manifest = replace(published, files=files, signatures=signatures)
    pinned = chosen_manifest.pinned(pins, listing.uri, listing.revision)
    return Resolution(pinned, tuple(skipped), {}, whole)


async def _listing_of(origin: Origin, files: tuple[ManifestFile, ...]) -> Listing:
    """A listing, or where the origin cannot list (plain HTTP) a look at each file."""
    if not origin.uri.startswith(("http://", "https://")):
        return await origin.list()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def look(path: str) -> OriginFile | None:
        async with gate:
            return await origin.stat(path)

    found = await _together(look(f.path) for f in files)
    return Listing(origin.uri, tuple(f for f in found if f is not None))


async def _from_listing(
    origin: Origin,
    wanted: Selection,
    chunk: int,
    algorithm: str,
    known: Callable[[Manifest], Manifest | None],
) -> Resolution:
    listing = await origin.list()
    check_tree((f.path for f in listing.files), f"the listing of {listing.uri}")
    wanted = selection.outer([f.path for f in listing.files], wanted)
    kept, skipped = selection.select([(f.path, f.size) for f in listing.files], wanted)
    chosen = set(kept)
    listed = sorted((f for f in listing.files if f.path in chosen), key=lambda f: f.path)
    _not_empty(listed, listing.uri, skipped)
    for file in listed:
        check_size(file.path, file.size, f"the listing of {listing.uri}")

    def build(cut: Callable[[OriginFile], grid.Grid]) -> Manifest:
        files = tuple(ManifestFile(f.path, f.size, cut(f), f.digest, None, f.pin) for f in listed)
        return Manifest(files, algorithm, uri=listing.uri, revision=listing.revision)

    plain = build(lambda f: grid.fixed(f.size, chunk))
    stored = known(plain)
    if stored is not None:
        return Resolution(stored, tuple(skipped), {})
    headers, grids = await _read_headers(origin, listed, chunk)
    return Resolution(
        build(lambda f: grids.get(f.path) or grid.fixed(f.size, chunk)), tuple(skipped), headers
    )


async def _read_headers(
    origin: Origin, files: list[OriginFile], chunk: int
) -> tuple[dict[str, bytes], dict[str, grid.Grid]]:
    """The header bytes of every safetensors file, and the grids that follow from them."""
    gate = asyncio.Semaphore(_AT_ONCE)
    headers: dict[str, bytes] = {}
    grids: dict[str, grid.Grid] = {}

    async def read(file: OriginFile, start: int, stop: int) -> bytes:
        return b"".join([bytes(piece) async for piece in origin.read(file, start, stop)])

    async def one(file: OriginFile) -> None:
        where = f"{origin.uri}/{file.path}"
        async with gate:
            first = await read(file, 0, min(PREFIX, file.size))
            length = header_length(first, file.size, where)
            head = await read(file, PREFIX, PREFIX + length)
        header = parse_header(head, file.size, where)
        spans = ((header.data_start + t.start, header.data_start + t.stop) for t in header.tensors.values())
        headers[file.path] = first + head
        grids[file.path] = grid.by_tensors(file.size, header.data_start, spans, chunk)

    await _together(one(f) for f in files if f.path.endswith(".safetensors"))
    return headers, grids


async def _together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; at the first failure the rest is cancelled before it is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _not_empty(files: Sequence[object], uri: str, skipped: list[Skipped]) -> None:
    if not files:
        why = (
            f": all {len(skipped)} files were skipped ({skipped[0].path}: {skipped[0].why})"
            if skipped
            else ""
        )
        raise NotFound(f"{uri} holds no files to stage{why}; check the address and the patterns.")
