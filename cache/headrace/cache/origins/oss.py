"""Alibaba Cloud Object Storage Service (`oss://bucket/prefix`), through oss2.

oss2 rather than ossfs: it reads ranges under `If-Match`, so that every read is of the pinned version
(ossfs has no conditional read, and its `cat_file` takes `end` as inclusive, fsspec/ossfs#166).

Credentials are looked up for every request: `OSS_ACCESS_KEY_ID`, `OSS_ACCESS_KEY_SECRET` and
`OSS_SECURITY_TOKEN`, or the `ALIBABA_CLOUD_` spellings of the same. The endpoint is `OSS_ENDPOINT`, or
the public one of `OSS_REGION`; with a region, requests are signed with V4.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import oss2
from oss2.credentials import Credentials, CredentialsProvider
from urllib3.exceptions import HTTPError

from headrace.cache.errors import (
    AccessDenied,
    NotFound,
    OriginChanged,
    OriginError,
    OriginMisconfigured,
    UsageError,
)
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.reference import Reference

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE = 4 << 20
THREADS = 32
PART = 32 << 20
"""Bytes of one part of an upload; the service allows 10,000 parts."""
_PAGE = 1000

T = TypeVar("T")


def open(reference: Reference, options: OriginOptions) -> OssOrigin:
    """The origin of an `oss://` reference.

    Raises:
        OriginMisconfigured: neither an endpoint nor a region is set, or the endpoint is not a URL.
    """
    endpoint = options.endpoint
    if endpoint is None and options.region:
        endpoint = f"https://oss-{options.region.removeprefix('oss-')}.aliyuncs.com"
    if endpoint is None:
        raise OriginMisconfigured(
            f"{reference.uri} needs an endpoint: set OSS_ENDPOINT "
            "(such as https://oss-cn-hangzhou.aliyuncs.com) or OSS_REGION."
        )
    return OssOrigin(reference, endpoint, options)


class _Environment(CredentialsProvider):  # type: ignore[misc]
    """The credentials that the environment holds at the moment of each request."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def get_credentials(self) -> Credentials:
        for prefix in ("OSS_", "ALIBABA_CLOUD_"):
            key, secret = (
                os.environ.get(f"{prefix}ACCESS_KEY_ID"),
                os.environ.get(f"{prefix}ACCESS_KEY_SECRET"),
            )
            if key and secret:
                return Credentials(key, secret, os.environ.get(f"{prefix}SECURITY_TOKEN", ""))
        raise AccessDenied(
            f"{self._uri} needs credentials: set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET "
            "(and OSS_SECURITY_TOKEN for temporary ones)."
        )


class OssOrigin:
    """A prefix of a bucket; oss2 blocks, so its calls run in threads."""

    notices_stalls = True  # a timeout on each socket

    def __init__(self, reference: Reference, endpoint: str, options: OriginOptions) -> None:
        self._uri = reference.uri
        self._key = reference.key
        self._headers = {"x-oss-request-payer": "requester"} if options.requester_pays else {}
        self._headers |= dict(options.headers)
        self._session = oss2.Session(pool_size=THREADS)
        if options.ca_bundle:
            self._session.session.verify = options.ca_bundle
        region = options.region.removeprefix("oss-") if options.region else None
        provider = _Environment(self._uri)
        auth: Any = oss2.AnonymousAuth()
        if not options.anonymous:
            auth = oss2.ProviderAuthV4(provider) if region else oss2.ProviderAuth(provider)
        try:
            self._bucket = oss2.Bucket(
                auth,
                endpoint,
                reference.container,
                session=self._session,
                connect_timeout=(options.connect_timeout, options.stall_timeout),
                # The checksum of a whole object is no use to ranges, and costs 0.5 CPU s/GB.
                enable_crc=False,
                proxies={"http": options.proxy, "https": options.proxy} if options.proxy else None,
                region=region,
                is_verify_object_strict=False,
            )
        except oss2.exceptions.ClientError as error:
            raise OriginMisconfigured(
                f"{self._uri}: {endpoint!r} is no endpoint, or the bucket no name."
            ) from error
        self._name = posixpath.basename(self._key)
        self._single: bool | None = None
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="headrace-oss")

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Listing:
        """Every object below the prefix; a reference to one object lists that object.

        Raises:
            NotFound: no such bucket, or nothing below the prefix.
        """
        return await self._threaded(self._list, self._uri)

    async def stat(self, path: str) -> OriginFile | None:
        """One object with its pin; None if it does not exist."""
        return await self._threaded(lambda: self._stat(path), self._child_uri(path))

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) under `If-Match`, in pieces of at most 4 MiB.

        Raises:
            OriginChanged: the object is no longer the pinned version.
        """
        if start >= stop:
            return
        uri = self._child_uri(file.path)
        opening = self._executor.submit(self._get, file, start, stop)
        try:
            result = await self._translated(asyncio.wrap_future(opening), uri)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise
        try:
            while piece := await self._threaded(lambda: _piece(result), uri):
                yield piece
        finally:
            # Not read to its end, the connection is closed instead of being used again.
            result.resp.response.close()

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """A small object whole; None if it does not exist."""
        return await self._threaded(lambda: self._fetch(path, limit), self._child_uri(path))

    async def put(self, path: str, source: str) -> None:
        """Upload `source`, in parts if it is large; visible once it is complete."""
        await self._threaded(lambda: self._upload(self._target(path), source), self._child_uri(path))

    async def put_bytes(self, path: str, data: bytes) -> None:
        await self._threaded(
            lambda: self._bucket.put_object(self._target(path), data, headers=self._sent()),
            self._child_uri(path),
        )

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._session.session.close()

    async def _threaded(self, job: Callable[[], T], uri: str) -> T:
        return await self._translated(asyncio.wrap_future(self._executor.submit(job)), uri)

    async def _translated(self, answer: Awaitable[T], uri: str) -> T:
        try:
            return await answer
        except oss2.exceptions.RequestError as error:
            # oss2 wraps what failed below HTTP: the cause says more.
            raise translate.foreign(error.exception, uri) from error
        except (oss2.exceptions.OssError, OSError, HTTPError) as error:
            raise translate.foreign(error, uri) from error

    def _child_uri(self, path: str) -> str:
        return self._uri if self._single and path == self._name else f"{self._uri}/{path}"

    def _target(self, path: str) -> str:
        """The key of `path`; asks, the first time, whether the reference is itself an object of that name."""
        if not self._key:
            return path
        if path == self._name and self._single is None:
            self._single = self._head(self._key, path) is not None
        return self._key if self._single and path == self._name else f"{self._key}/{path}"

    def _sent(self, **more: str) -> dict[str, str]:
        return {**self._headers, **more}

    def _list(self) -> Listing:
        prefix = f"{self._key}/" if self._key else ""
        files: list[OriginFile] = []
        token = ""
        while True:
            page = self._bucket.list_objects_v2(
                prefix, continuation_token=token, max_keys=_PAGE, headers=self._sent()
            )
            files += [
                OriginFile(entry.key[len(prefix) :], entry.size, Pin("etag", entry.etag.strip('"')))
                for entry in page.object_list
                if not entry.key.endswith("/")
            ]
            if not page.is_truncated:
                break
            token = page.next_continuation_token
        self._single = False
        if files:
            return Listing(self._uri, tuple(sorted(files, key=lambda file: file.path)))
        single = self._head(self._key, self._name) if self._key else None
        if single is None:
            raise NotFound(
                f"{self._uri} does not exist, or no object lies below it: check bucket and prefix."
            )
        self._single = True
        return Listing(self._uri, (single,), single=True)

    def _stat(self, path: str) -> OriginFile | None:
        return self._head(self._target(path), path)

    def _head(self, key: str, path: str) -> OriginFile | None:
        try:
            found = self._bucket.head_object(key, headers=self._sent())
        except (oss2.exceptions.NoSuchKey, oss2.exceptions.NotFound) as error:
            if isinstance(error, oss2.exceptions.NoSuchBucket):
                raise NotFound(f"{self._uri}: there is no such bucket at this endpoint.") from error
            return None
        return OriginFile(path, found.content_length, Pin("etag", found.etag.strip('"')))

    def _get(self, file: OriginFile, start: int, stop: int) -> Any:
        uri = self._child_uri(file.path)
        try:
            result = self._bucket.get_object(
                self._target(file.path),
                byte_range=(start, stop - 1),
                headers=self._sent(**{"If-Match": f'"{file.pin.value}"'}),
            )
        except oss2.exceptions.OssError as error:
            # 416: it is shorter now.
            if error.status in (412, 416):
                raise _changed(uri, file) from error
            raise
        if (result.etag or "").strip('"') != file.pin.value:
            result.resp.response.close()
            raise _changed(uri, file)
        if result.content_range is None:
            result.resp.response.close()
            raise OriginMisconfigured(
                f"the server of {uri} ignores ranges: check OSS_ENDPOINT and the proxy."
            )
        return result

    def _fetch(self, path: str, limit: int) -> bytes | None:
        file = self._stat(path)
        if file is None:
            return None
        if file.size > limit:
            raise OriginError(
                f"{self._child_uri(path)} is {file.size} bytes long, over the limit of {limit} for such a file."
            )
        data: bytes = self._bucket.get_object(self._target(path), headers=self._sent()).read()
        return data

    def _upload(self, key: str, source: str) -> None:
        if self._single:
            raise UsageError(f"{self._uri} is one object: publish to a prefix.")
        try:
            size = os.path.getsize(source)
        except OSError as error:
            raise UsageError(f"{source} cannot be uploaded ({error.strerror}).") from error
        if size <= PART:
            self._bucket.put_object_from_file(key, source, headers=self._sent())
            return
        upload = self._bucket.init_multipart_upload(key, headers=self._sent()).upload_id
        try:
            parts: list[Any] = []
            with Path(source).open("rb") as reader:
                while data := reader.read(PART):
                    number = len(parts) + 1
                    done = self._bucket.upload_part(key, upload, number, data, headers=self._sent())
                    parts.append(oss2.models.PartInfo(number, done.etag))
            self._bucket.complete_multipart_upload(key, upload, parts, headers=self._sent())
        except BaseException:
            self._bucket.abort_multipart_upload(key, upload, headers=self._sent())
            raise


def _close_unused(opening: Future[Any]) -> None:
    """A read that was cancelled while its request was under way: nobody will read the answer."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().resp.response.close()


def _piece(result: Any) -> bytes:
    data: bytes = result.read(PIECE)
    return data


def _changed(uri: str, file: OriginFile) -> OriginChanged:
    return OriginChanged(
        f"{uri} is no longer the version that was listed ({file.pin}): run the command again."
    )
