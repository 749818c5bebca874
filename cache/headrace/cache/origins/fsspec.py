"""Any filesystem that fsspec knows, as an origin.

fsspec has no read that is conditional on a version. So the pin is taken from `info()` (the strongest
of version id, generation, ETag, modification time and size that the filesystem tells), and compared
again by a fresh `info()` before the last piece of a read is handed over. That holds as far as the
filesystem's `info` does: where it tells a version or an ETag, bytes of another version never complete a
read; where it tells a time or only a size, a file rewritten within the resolution of its clock, or to
the same size, is noticed by digests alone.

Every origin has a filesystem instance of its own, and listings are dropped before each question, so
that fsspec's caches answer nothing stale.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.core import url_to_fs

from headrace.cache.errors import HeadraceError, NotFound, OriginChanged, OriginError, UsageError
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.reference import Reference, unknown_scheme

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE = 8 << 20
"""Bytes of one `cat_file`: a request each, so larger than what a stream would be cut into."""
THREADS = 32

# What filesystems call the same thing, strongest first.
_PINS = (
    ("version", ("VersionId", "version_id", "versionId")),
    ("generation", ("generation",)),
    ("etag", ("ETag", "etag", "e_tag", "content_md5", "md5Hash", "checksum")),
    ("mtime", ("mtime", "LastModified", "last_modified", "updated", "modified", "modifiedTime", "created")),
    # Archives: the checksum of the member, as its time has a resolution of two seconds.
    ("etag", ("CRC",)),
)
_KINDS = ("version", "generation", "etag", "mtime")

T = TypeVar("T")


def open(reference: Reference, options: OriginOptions) -> FsspecOrigin:
    """The origin of a reference whose scheme fsspec knows.

    Raises:
        UsageError: no such scheme.
        MissingDependency: the library that serves the scheme is not installed.
    """
    if reference.scheme not in fsspec.available_protocols():
        raise unknown_scheme(reference.scheme)
    try:
        filesystem, root = url_to_fs(reference.uri, skip_instance_cache=True)
    except Exception as error:  # fsspec's filesystems share no base of their errors
        raise translate.foreign(error, reference.uri) from error
    return FsspecOrigin(reference.uri, filesystem, root)


class FsspecOrigin:
    """A path of an fsspec filesystem; calls block, so they run in threads."""

    def __init__(self, uri: str, filesystem: Any, root: str) -> None:
        self._uri = uri
        self._filesystem = filesystem
        self._root: str = filesystem._strip_protocol(root).rstrip("/")
        self._name = posixpath.basename(self._root)
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="headrace-fsspec")
        self._single: bool | None = None

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Listing:
        """Every file below the path; a reference to a file lists that file under its own name.

        Raises:
            NotFound: nothing is there.
        """
        return await self._threaded(self._list, self._uri)

    async def stat(self, path: str) -> OriginFile | None:
        """One file with its pin; None if it does not exist."""
        return await self._threaded(lambda: self._stat(path), self._child_uri(path))

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) in pieces of at most 8 MiB, the last one after the pin was compared.

        Raises:
            OriginChanged: the file is no longer the pinned version.
        """
        uri = self._child_uri(file.path)
        position = start
        while position < stop:
            end = min(position + PIECE, stop)
            piece = await self._threaded(lambda a=position, b=end: self._cat(file, a, b), uri)  # type: ignore[misc]
            if end == stop or len(piece) != end - position:
                await self._threaded(lambda: self._compare(file), uri)
            yield piece
            position += len(piece)
            if len(piece) < end - position:
                return

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """A small file whole; None if it does not exist."""
        return await self._threaded(lambda: self._fetch(path, limit), self._child_uri(path))

    async def put(self, path: str, source: str) -> None:
        """Upload `source`. Atomic where the filesystem's own upload is (object stores are)."""

        def upload() -> None:
            if not os.access(source, os.R_OK):
                raise UsageError(f"{source} cannot be uploaded: it is not there, or not readable.")
            target = self._writable(path)
            self._filesystem.put_file(source, target)

        await self._threaded(upload, self._child_uri(path))

    async def put_bytes(self, path: str, data: bytes) -> None:
        """Upload `data`. Atomic where the filesystem's own upload is."""

        def upload() -> None:
            target = self._writable(path)
            self._filesystem.pipe_file(target, data)

        await self._threaded(upload, self._child_uri(path))

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _threaded(self, job: Callable[[], T], uri: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except NotImplementedError as error:
            raise UsageError(f"{uri} cannot be published to: its filesystem is read-only.") from error
        except HeadraceError:
            raise
        except Exception as error:  # fsspec's filesystems share no base of their errors
            raise translate.foreign(error, uri) from error

    def _child_uri(self, path: str) -> str:
        if self._single and path == self._name:
            return self._uri
        first, chain, rest = self._uri.partition("::")
        return f"{first}/{path}{chain}{rest}"

    def _target(self, path: str) -> str:
        """Where `path` lies; asks, the first time, whether the reference is itself a file of that name."""
        if path == self._name and self._single is None:
            try:
                self._single = self._info(self._root)["type"] == "file"
            except FileNotFoundError:
                self._single = False
        return self._root if self._single and path == self._name else f"{self._root}/{path}"

    def _info(self, target: str) -> Mapping[str, Any]:
        self._filesystem.invalidate_cache()
        info: Mapping[str, Any] = self._filesystem.info(target)
        return info

    def _list(self) -> Listing:
        try:
            info = self._info(self._root)
        except FileNotFoundError as error:
            raise NotFound(
                f"{self._uri} does not exist, or no file lies below it: check the path."
            ) from error
        self._single = info["type"] == "file"
        if self._single:
            return Listing(self._uri, (_describe(self._name, info),), single=True)
        found: Mapping[str, Mapping[str, Any]] = self._filesystem.find(self._root, detail=True)
        files = sorted(
            (
                _describe(_relative(name, self._root), info)
                for name, info in found.items()
                if info["type"] == "file" and not name.endswith("/")
            ),
            key=lambda file: file.path,
        )
        if not files:
            raise NotFound(f"{self._uri} does not exist, or no file lies below it: check the path.")
        return Listing(self._uri, tuple(files))

    def _stat(self, path: str) -> OriginFile | None:
        try:
            info = self._info(self._target(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _describe(path, info) if info["type"] == "file" else None

    def _cat(self, file: OriginFile, start: int, stop: int) -> bytes:
        target = self._target(file.path)
        if start == 0 and stop == file.size:
            data: bytes = self._filesystem.cat_file(target)
        else:
            data = self._filesystem.cat_file(target, start=start, end=stop)
        if len(data) != stop - start:
            self._compare(file)
        return data

    def _compare(self, file: OriginFile) -> None:
        uri = self._child_uri(file.path)
        try:
            info = self._info(self._target(file.path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{uri} was deleted after it was listed: list it again.") from error
        # Of the same kind, as a filesystem may tell more of one file than in a listing.
        now = _pin(info, (file.pin.kind,))
        if now != file.pin or int(info["size"]) != file.size:
            raise OriginChanged(
                f"{uri} changed after it was listed (was {file.pin}, is {now}): run the command again."
            )

    def _fetch(self, path: str, limit: int) -> bytes | None:
        file = self._stat(path)
        if file is None:
            return None
        if file.size > limit:
            raise OriginError(
                f"{self._child_uri(path)} is {file.size} bytes long, over the limit of {limit} for such a file."
            )
        data: bytes = self._filesystem.cat_file(self._target(path))
        return data

    def _writable(self, path: str) -> str:
        """The target of an upload, its directory made where the filesystem has directories."""
        if isinstance(self._filesystem, AbstractArchiveFileSystem):
            raise UsageError(
                f"{self._uri} is an archive, which cannot be published to: publish to a directory."
            )
        target = self._target(path)
        if self._single:
            raise UsageError(f"{self._uri} is a file: publish to a directory.")
        self._filesystem.makedirs(posixpath.dirname(target), exist_ok=True)
        self._filesystem.invalidate_cache()
        return target


def _relative(name: str, root: str) -> str:
    return name[len(root) :].lstrip("/")


def _describe(path: str, info: Mapping[str, Any]) -> OriginFile:
    return OriginFile(path, int(info["size"]), _pin(info))


def _pin(info: Mapping[str, Any], kinds: tuple[str, ...] = _KINDS) -> Pin:
    """The strongest pin of these kinds that `info` tells, or else the size."""
    for kind, names in _PINS:
        for name in names if kind in kinds else ():
            value = info.get(name)
            if value not in (None, "", "null"):
                return Pin(
                    kind, f"{_moment(value)}-{info['size']}" if kind == "mtime" else str(value).strip('"')
                )
    return Pin("size", str(info["size"]))


def _moment(value: object) -> str:
    """A time in one spelling: some filesystems give a number in a listing and a datetime for one file."""
    if isinstance(value, datetime):
        return repr((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    return repr(float(value)) if isinstance(value, int | float) else str(value)
