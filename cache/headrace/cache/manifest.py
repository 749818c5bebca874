"""Manifests: the description of one revision.

One form serves the published manifest (`headrace.manifest.json` beside the model) and the store's
`manifest.json`; the store's also keeps where the bytes came from (URI, revision, version pins).
The signed and digested part is the canonical form of what a publisher says: algorithm, predecessor
and files with sizes, whole-file digests, chunk lengths and chunk digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from headrace.cache.digest import ALGORITHMS, XXH3, digest_size, identity
from headrace.cache.errors import ManifestError
from headrace.cache.grid import Grid
from headrace.cache.origins.protocol import OriginFile, Pin
from headrace.cache.paths import check_size, check_tree

FORMAT = 1
PUBLISHED_NAME = "headrace.manifest.json"
MAX_BYTES = 512 << 20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a revision.

    Attributes:
        path: relative POSIX path.
        size: bytes.
        grid: chunk lengths; they add up to `size`.
        digest: "sha256:<hex>" of the whole file, where a publisher gave one.
        chunks: hex digests of the chunks in the manifest's algorithm, where a publisher gave them.
        pin: the version at the origin; None in a published manifest.
    """

    path: str
    size: int
    grid: Grid
    digest: str | None = None
    chunks: tuple[str, ...] | None = None
    pin: Pin | None = None

    def content_key(self, uri: str | None, algorithm: str) -> str:
        """The file's identity (design: words)."""
        if self.digest is not None:
            return self.digest
        if self.chunks is not None:
            return f"chunks:{identity(algorithm, self.grid.identity, *self.chunks)}"
        if self.pin is None or uri is None:
            raise ManifestError(f"the file {self.path!r} has neither a digest nor a version pin.")
        return f"pin:{identity(uri, self.path, str(self.pin), str(self.size))}"

    def origin_file(self) -> OriginFile:
        """As the origin wants it. Raises ManifestError without a pin."""
        if self.pin is None:
            raise ManifestError(f"the file {self.path!r} has no version pin to read by.")
        return OriginFile(self.path, self.size, self.pin, self.digest)


@dataclass(frozen=True, slots=True)
class Signature:
    """An Ed25519 signature over the canonical manifest; `key` and `value` in hex."""

    key: str
    value: str


@dataclass(frozen=True)
class Manifest:
    """One revision; `published` when a publisher wrote it, else built from a listing.

    Attributes:
        signed_by: the trusted key (hex) whose signature over the whole published manifest held when this
            one, perhaps a selection of it, was resolved. Only in the store's own form.
    """

    files: tuple[ManifestFile, ...]
    algorithm: str = XXH3
    published: bool = False
    predecessor: str | None = None
    signatures: tuple[Signature, ...] = ()
    uri: str | None = None
    revision: str | None = None
    signed_by: str | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @cached_property
    def by_path(self) -> Mapping[str, ManifestFile]:
        return {file.path: file for file in self.files}

    def snapshot_id(self, domain: str) -> str:
        parts = [f"{f.path}\n{f.size}\n{f.content_key(self.uri, self.algorithm)}" for f in self.files]
        return identity("snapshot", domain, *parts)

    def object_id(self, domain: str, file: ManifestFile) -> str:
        # The algorithm belongs to the grid: learned digests of one object are all of one kind.
        key = file.content_key(self.uri, self.algorithm)
        return identity("object", domain, key, file.grid.identity, self.algorithm)

    def canonical(self) -> bytes:
        """What is digested and signed: UTF-8 JSON, sorted keys, no spaces."""
        return _dumps(self._body())

    @cached_property
    def digest(self) -> str:
        """The manifest's own identity, which successors name as their predecessor."""
        return f"sha256:{identity(self.canonical().decode())}"

    def _body(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "predecessor": self.predecessor,
            "files": [
                {
                    "path": f.path,
                    "size": f.size,
                    "lengths": f.grid.runs(),
                    "digest": f.digest,
                    "chunks": list(f.chunks) if f.chunks is not None else None,
                }
                for f in self.files
            ],
        }

    def to_published(self) -> bytes:
        """The bytes of `headrace.manifest.json`."""
        return self._envelope({})

    def to_stored(self) -> bytes:
        """The bytes of a snapshot's `manifest.json`, which also says where the bytes come from."""
        pins = {f.path: [f.pin.kind, f.pin.value] for f in self.files if f.pin is not None}
        return self._envelope(
            {
                "source": {
                    "uri": self.uri,
                    "revision": self.revision,
                    "published": self.published,
                    "signed_by": self.signed_by,
                    "pins": pins,
                }
            }
        )

    def _envelope(self, more: dict[str, Any]) -> bytes:
        signatures = [{"algorithm": "ed25519", "key": s.key, "value": s.value} for s in self.signatures]
        return _dumps({"headrace": FORMAT, "manifest": self._body(), "signatures": signatures, **more})

    def pinned(self, pins: Mapping[str, Pin], uri: str, revision: str | None) -> Manifest:
        """The same revision, with the pins that a listing of `uri` shows."""
        files = tuple(replace(f, pin=pins.get(f.path, f.pin)) for f in self.files)
        return replace(self, files=files, uri=uri, revision=revision)


def parse(data: bytes, where: str) -> Manifest:
    """Read a published or stored manifest.

    Raises:
        ManifestError: not a manifest, of a newer format, or contradicting itself.
        UnsafePath: paths or sizes that must not be written.
    """
    try:
        top = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not a headrace manifest: {error}.") from None
    if not isinstance(top, dict) or not isinstance(top.get("manifest"), dict):
        raise ManifestError(f"{where} is not a headrace manifest: it lacks the object 'manifest'.")
    if top.get("headrace") != FORMAT:
        raise ManifestError(
            f"{where} has the manifest format {top.get('headrace')!r}; this headrace reads "
            f"{FORMAT}: upgrade headrace."
        )
    body = top["manifest"]
    algorithm = body.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ManifestError(
            f"{where} uses the digest algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}."
        )
    source = _object(top.get("source", {}), where, "source")
    pins = _object(source.get("pins", {}), where, "pins")
    entries = body.get("files")
    if not isinstance(entries, list):
        raise ManifestError(f"{where}: 'files' is not a list.")
    files = tuple(_file(_object(e, where, "files"), algorithm, pins, where) for e in entries)
    check_tree((f.path for f in files), where)
    if [f.path for f in files] != sorted(f.path for f in files):
        raise ManifestError(f"{where}: 'files' is not sorted by path.")
    signatures = top.get("signatures", [])
    if not isinstance(signatures, list):
        raise ManifestError(f"{where}: 'signatures' is not a list.")
    return Manifest(
        files,
        algorithm,
        bool(source.get("published", True)),
        _text(body.get("predecessor"), where, "predecessor"),
        tuple(_signature(_object(s, where, "signatures"), where) for s in signatures),
        _text(source.get("uri"), where, "uri"),
        _text(source.get("revision"), where, "revision"),
        _text(source.get("signed_by"), where, "signed_by"),
    )


def _file(entry: dict[str, Any], algorithm: str, pins: dict[str, Any], where: str) -> ManifestFile:
    path, size = entry.get("path"), entry.get("size")
    if not isinstance(path, str) or type(size) is not int:
        raise ManifestError(f"{where}: a file entry lacks its path or its size.")
    check_size(path, size, where)
    grid = Grid.from_runs(entry.get("lengths"), f"{where}, {path}")
    if grid.size != size:
        raise ManifestError(f"{where}, {path}: the chunks add up to {grid.size} bytes, the size says {size}.")
    digest = _text(entry.get("digest"), where, "digest")
    if digest is not None and not (digest.startswith("sha256:") and _is_hex(digest[7:], 32)):
        raise ManifestError(f"{where}, {path}: {digest!r} is not a sha256 digest.")
    chunks = entry.get("chunks")
    if chunks is not None:
        width = digest_size(algorithm)
        if not isinstance(chunks, list) or not all(isinstance(c, str) and _is_hex(c, width) for c in chunks):
            raise ManifestError(f"{where}, {path}: a chunk digest is not {width * 2} hexadecimal digits.")
        if len(chunks) != len(grid):
            raise ManifestError(f"{where}, {path}: {len(chunks)} chunk digests for {len(grid)} chunks.")
        chunks = tuple(chunks)
    pin = pins.get(path)
    if pin is not None:
        if not (isinstance(pin, list) and len(pin) == 2 and all(isinstance(p, str) for p in pin)):
            raise ManifestError(f"{where}, {path}: the version pin {pin!r} is not [kind, value].")
        pin = Pin(*pin)
    return ManifestFile(path, size, grid, digest, chunks, pin)


def _signature(entry: dict[str, Any], where: str) -> Signature:
    key, value = entry.get("key"), entry.get("value")
    if entry.get("algorithm") != "ed25519" or not isinstance(key, str) or not isinstance(value, str):
        raise ManifestError(f"{where}: a signature is not an ed25519 signature with key and value.")
    return Signature(key, value)


def _object(value: object, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: {what!r} is not an object.")
    return value


def _text(value: object, where: str, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ManifestError(f"{where}: {what!r} is not text.")
    return value


def _is_hex(text: str, size: int) -> bool:
    return len(text) == 2 * size and _HEX.issuperset(text)


def _dumps(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
