"""The fast path: S3-compatible stores, Google Cloud Storage, Azure Blob Storage, through obstore.

Each call is a single attempt. Every answer's ETag, version and size are compared with the pin,
whatever the server did with If-Match, which some ignore.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from headrace.cache.errors import (
    AccessDenied,
    HeadraceError,
    NotFound,
    OriginChanged,
    OriginError,
    UsageError,
)
from headrace.cache.origins import stores, translate, wire
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.reference import Reference, quoted

if TYPE_CHECKING:
    from http.client import HTTPMessage

    from obstore import GetOptions, GetResult, ObjectMeta
    from typing_extensions import Buffer

# Bytes of one request, taken whole: the pieces of a stream are zeroed and copied once more (+0.2 CPU
# s/GB). From nginx 4 to 16 MiB cannot be told apart. From SeaweedFS 16 MiB bring a tenth more throughput,
# but with 16 requests at once they do not fit a pod of 512 MiB beside torch.
PIECE = 8 << 20
HEADS = 32  # HEAD requests under way at once
PART = 16 << 20  # of an upload; S3 takes 10,000 parts
PARTS = 9_000
UPLOADS = 8  # parts under way at once
RENEWAL = 5.0  # seconds within which a second refusal is taken at its word
SIGNED = 3600.0  # seconds that a signed URL is good for; used for half of that

_NEVER = datetime.fromtimestamp(0, UTC)

T = TypeVar("T")


async def many(ask: Callable[[str], Awaitable[T]], paths: Sequence[str]) -> Sequence[T]:
    """The answers for all paths, in order, some at a time; the first error ends it."""
    gate = asyncio.Semaphore(HEADS)

    async def one(path: str) -> T:
        async with gate:
            return await ask(path)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(path)) for path in paths]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def open(reference: Reference, options: OriginOptions) -> ObstoreOrigin:
    """The origin of an s3, gs, az, http or https reference."""
    if reference.scheme in ("http", "https"):
        from headrace.cache.origins.web import WebOrigin

        return WebOrigin(reference, options)
    return ObstoreOrigin(reference, options)


class ObstoreOrigin:
    """A prefix, or a single object, of a bucket."""

    notices_stalls = True

    def __init__(self, reference: Reference, options: OriginOptions) -> None:
        self._reference = reference
        self._options = options
        self._store, self._renewable = stores.build(reference, options)
        self._renewed = 0.0
        self._top = reference.key
        """The key of the reference: a prefix without its slash, or the object itself."""
        self._single: bool | None = None
        """Whether the reference names one object; None until that is known."""
        self._wire = wire.Wire(options)
        self._targets: dict[tuple[str, Pin], tuple[wire.Target | None, float]] = {}
        """Where the wire reads each version of a file, and until when that is good."""

    @property
    def uri(self) -> str:
        return self._reference.uri

    # -- looking -------------------------------------------------------------------------------

    async def list(self) -> Listing:
        """Everything below "<key>/", else the object <key> itself.

        Where the container keeps versions (S3 versioning, GCS generations), each file is asked for
        its own, since listings do not tell; a file that is replaced can then still be read.
        """
        found = await self._ask(self._listed, self.uri)
        prefix = f"{self._top}/" if self._top else ""
        below = {m["path"][len(prefix) :]: m for m in found if m["path"].startswith(prefix)}
        below.pop("", None)
        files = await self._pinned(await self._without_markers(below))
        if files:
            self._single = False
            return Listing(self.uri, files)
        file = await self._head(self._top) if self._top else None
        if file is None:
            raise NotFound(f"there is nothing at {self.uri}: check the bucket and the prefix.")
        self._single = True
        return Listing(self.uri, (file,), single=True)

    async def stat(self, path: str) -> OriginFile | None:
        """One HEAD request."""
        return await self._head(await self._key(path))

    async def _listed(self, store: stores.Store) -> Sequence[ObjectMeta]:
        return await obstore.list(store, self._top or None).collect_async()

    async def _head(self, key: str) -> OriginFile | None:
        """The object `key`, pinned, under its last name; None if there is none."""
        try:
            meta = await self._ask(lambda store: obstore.head_async(store, key), self._at(key))
        except NotFound:
            return None
        return self._file(self._relative(key), meta)

    async def _without_markers(self, below: dict[str, ObjectMeta]) -> dict[str, ObjectMeta]:
        """Without the empty objects "directory/" that some tools make.

        obstore lists them without their slash: they are told from empty files by having files below
        them, or by not being there under that name.
        """
        empty = [path for path, meta in below.items() if meta["size"] == 0]
        markers = {path for path in empty if any(other.startswith(f"{path}/") for other in below)}
        doubtful = [path for path in empty if path not in markers]
        heads = await self._heads(doubtful)
        markers |= {path for path, head in zip(doubtful, heads, strict=True) if head is None}
        return {path: meta for path, meta in below.items() if path not in markers}

    async def _pinned(self, below: dict[str, ObjectMeta]) -> tuple[OriginFile, ...]:
        files = [self._file(path, below[path]) for path in sorted(below)]
        if not files or self._reference.scheme == "az":  # an Azure blob's ETag changes with every write
            return tuple(files)
        first = (await self._heads([files[0].path]))[0]
        if first is None or first.pin.kind not in ("version", "generation"):
            return tuple(files)
        heads = await self._heads([file.path for file in files])
        return tuple(head for head in heads if head is not None)

    async def _heads(self, paths: Sequence[str]) -> Sequence[OriginFile | None]:

        async def one(path: str) -> OriginFile | None:
            file = await self._head(self._below(path))
            return None if file is None else OriginFile(path, file.size, file.pin)

        return await many(one, paths)

    # -- reading -------------------------------------------------------------------------------

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) as obstore's buffers, which are handed on uncopied; a request for each."""
        if start >= stop:
            return
        key = await self._key(file.path)
        options: GetOptions = {}
        if file.pin.kind in ("version", "generation"):
            options["version"] = file.pin.value
        elif file.pin.kind == "etag" and not file.pin.value.startswith("W/"):
            options["if_match"] = f'"{file.pin.value}"'
        for position in range(start, stop, PIECE):
            options["range"] = (position, min(stop, position + PIECE))
            yield await self._piece(file, key, options)

    async def read_to(
        self, file: OriginFile, start: int, stop: int, put: Callable[[memoryview], None]
    ) -> bool:
        """See `protocol.DirectReads`: one request, by the wire, where that can do it."""
        key, position = await self._key(file.path), start

        def forward(piece: memoryview) -> None:
            nonlocal position
            put(piece)
            position += len(piece)

        # Not `_ask`: what `put` raises is not the origin's and stays as it is. The wire's own errors are ours already.
        async def attempt(store: stores.Store) -> bool:
            target = await self._once(lambda store: self._target(store, file, key), store, self._at(key))
            if target is not None:
                await self._wire.get(
                    target, position, stop, lambda headers: self._accept(file, headers), forward
                )
            return target is not None

        store = self._store
        try:
            try:
                return await attempt(store)
            except AccessDenied:
                if not self._renew(store):
                    raise
            return await attempt(self._store)
        except wire.Declined:
            return False  # the usual client asks again, and finds the words
        except (NotFound, translate.WrongRange) as error:
            raise await self._explained(error, key, file) from None

    async def _target(self, store: stores.Store, file: OriginFile, key: str) -> wire.Target | None:
        """Where the wire can read the file: plain HTTP without a proxy, and a URL that needs no more headers.

        A signed URL cannot ask for a version or let the requester pay.
        """
        target, until = self._targets.get((key, file.pin), (None, 0.0))
        if time.monotonic() < until:
            return target
        target = None
        if not self._options.proxy and file.pin.kind in ("etag", "mtime"):
            url = await self._url(store, key)
            if url is not None and url.startswith("http://"):
                headers = dict(self._options.headers)
                if file.pin.kind == "etag" and not file.pin.value.startswith("W/"):
                    headers["If-Match"] = f'"{file.pin.value}"'
                target = wire.Target(url, self._at(key), headers)
        self._targets[key, file.pin] = target, time.monotonic() + SIGNED / 2
        return target

    async def _url(self, store: stores.Store, key: str) -> str | None:
        """A URL that reads the object without further credentials, if there may be one."""
        plain = (self._options.endpoint or "").startswith("http://")
        if (
            not plain
            or not isinstance(store, S3Store)
            or self._options.anonymous
            or self._options.requester_pays
        ):
            return None
        return await obstore.sign_async(store, "GET", key, timedelta(seconds=SIGNED))

    def _accept(self, file: OriginFile, headers: HTTPMessage) -> None:
        """Compare an answer with the pin, as `_compare` does; in doubt the usual client shall say."""
        modified = headers["Last-Modified"]
        try:
            meta: ObjectMeta = {
                "path": file.path,
                "size": int(headers["Content-Range"].rpartition("/")[2]),
                "e_tag": headers["ETag"],
                "version": None,
                "last_modified": parsedate_to_datetime(modified) if modified else _NEVER,
            }
        except (TypeError, ValueError):
            raise wire.Declined from None
        seen = self._file(file.path, meta, file.pin.kind)
        if (seen.size, seen.pin) != (file.size, file.pin):
            raise wire.Declined

    async def _piece(self, file: OriginFile, key: str, options: GetOptions) -> Buffer:
        """One range of the pinned version."""
        uri = self._at(key)
        try:
            result = await self._ask(lambda store: self._get(store, key, options), uri)
        except (NotFound, translate.WrongRange) as error:
            raise await self._explained(error, key, file) from None
        self._compare(file, result.meta, uri)
        try:
            return await result.bytes_async()
        except (BaseError, OSError) as error:
            raise translate.foreign(error, uri) from None

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """One GET of the whole object; its size is looked at before its bytes are."""
        key = await self._key(path)

        async def whole(store: stores.Store) -> bytes:
            result = await self._get(store, key, {})
            if result.meta["size"] > limit:
                raise OriginError(
                    f"{self._at(key)} is {result.meta['size']} bytes long, over the limit of {limit} for such a file."
                )
            return bytes(await result.bytes_async())

        try:
            return await self._ask(whole, self._at(key))
        except NotFound:
            return None

    async def _get(self, store: stores.Store, key: str, options: GetOptions) -> GetResult:
        async with asyncio.timeout(self._options.first_byte_timeout):
            return await obstore.get_async(store, key, options=options)

    def _compare(self, file: OriginFile, meta: ObjectMeta, uri: str) -> None:
        seen = self._file(file.path, meta, file.pin.kind)
        if seen.pin != file.pin or seen.size != file.size:
            raise OriginChanged(
                f"{uri} was replaced: its {seen.pin.kind} is no longer the one that was listed; "
                "run this again to take the new version."
            )

    async def _explained(self, error: OriginError, key: str, file: OriginFile) -> OriginError:
        """Whether a refusal of a pinned range means that the object is another one now."""
        try:
            now = await self._head(key)
        except OriginError:
            return error
        if now is not None and (now.size, now.pin) != (file.size, file.pin):
            return OriginChanged(f"{self._at(key)} was replaced: run this again to take the new version.")
        return error

    # -- writing -------------------------------------------------------------------------------

    async def put(self, path: str, source: str) -> None:
        """Large files go in parts, several at a time; the object appears when all are there.

        Raises:
            UsageError: `source` cannot be read.
        """
        try:
            size = os.stat(source).st_size
        except OSError as error:
            raise UsageError(f"{source} cannot be uploaded ({error.strerror}).") from error
        key = self._below(path)

        async def upload(store: stores.Store) -> object:
            part = max(PART, -(-size // PARTS))
            return await obstore.put_async(
                store, key, Path(source), use_multipart=size > part, chunk_size=part, max_concurrency=UPLOADS
            )

        await self._ask(upload, self._at(key))

    async def put_bytes(self, path: str, data: bytes) -> None:
        """One PUT, which is atomic."""
        key = self._below(path)
        await self._ask(lambda store: obstore.put_async(store, key, data, use_multipart=False), self._at(key))

    async def close(self) -> None:
        """Close the wire's connections; a task of obstore's that just ended gets the time to let go."""
        self._wire.close()
        await asyncio.sleep(0)

    # -- names ---------------------------------------------------------------------------------

    def _below(self, path: str) -> str:
        return f"{self._top}/{path}" if self._top else path

    async def _key(self, path: str) -> str:
        """The key of a file of the listing; of a single object, that is the reference's own.

        A process that did not list asks once, and only where the name leaves it open.
        """
        if path != self._top.rpartition("/")[2] or self._single is False:
            return self._below(path)
        if self._single is None:
            self._single = await self._head(self._top) is not None
        return self._top if self._single else self._below(path)

    def _relative(self, key: str) -> str:
        prefix = f"{self._top}/" if self._top else ""
        return key[len(prefix) :] if key.startswith(prefix) else key.rpartition("/")[2]

    def _at(self, key: str) -> str:
        return f"{self._reference.scheme}://{self._reference.container}/{quoted(key)}"

    def _file(self, path: str, meta: ObjectMeta, kind: str | None = None) -> OriginFile:
        """A file with its strongest pin, or the pin of `kind` (to compare with one of that kind)."""
        version, etag = meta["version"], (meta["e_tag"] or "").strip()
        if not etag.startswith("W/"):
            etag = etag.strip('"')
        numbered = "generation" if self._reference.scheme == "gs" else "version"
        pins = {
            numbered: version if version != "null" else None,  # "null": S3 versioning is suspended
            "etag": etag,
            "mtime": f"{meta['last_modified'].timestamp():.0f}-{meta['size']}",
        }
        if kind is None:
            kind = next(name for name, value in pins.items() if value)
        return OriginFile(path, meta["size"], Pin(kind, pins.get(kind) or ""))

    # -- one attempt ---------------------------------------------------------------------------

    async def _ask(self, request: Callable[[stores.Store], Awaitable[T]], uri: str) -> T:
        """Make a request; if it is refused, once more with credentials asked for anew."""
        store = self._store
        try:
            return await self._once(request, store, uri)
        except AccessDenied:
            if not self._renew(store):
                raise
        return await self._once(request, self._store, uri)

    async def _once(
        self, request: Callable[[stores.Store], Awaitable[T]], store: stores.Store, uri: str
    ) -> T:
        try:
            return await request(store)
        except HeadraceError:
            raise
        except (BaseError, OSError, ValueError) as error:
            # Not "from error": its text may hold a signed URL.
            raise translate.foreign(error, uri) from None

    def _renew(self, refused: stores.Store) -> bool:
        """Put a store with fresh credentials in the place of the refused one; False if there are none."""
        if not self._renewable:
            return False
        if self._store is refused:
            now = time.monotonic()
            if self._renewed and now - self._renewed < RENEWAL:
                return False
            self._store, _ = stores.build(self._reference, self._options)
            self._targets.clear()
            self._renewed = now
        return True


@atexit.register
def _settle() -> None:
    """Let obstore's threads drop what they hold of Python before the interpreter goes.

    A thread that asks for the interpreter's lock while it is being finalized aborts the process
    (CPython before 3.14), and obstore has no shutdown.
    """
    time.sleep(0.02)
