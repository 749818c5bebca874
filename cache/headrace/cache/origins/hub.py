"""Repositories of the Hugging Face hub (`hf://org/name[@revision][/directory]`, `hf://datasets/...`).

A revision is resolved to a commit, and every file is pinned to it: commits never change, so a branch
that moves on disturbs nothing. Files under Git LFS carry the publisher's sha256. Bytes are read by
ranged GETs: a file's resolve URL is asked once where its bytes are (a signed URL of a CDN, for large
files), which is used until it is refused; obstore does the GETs, at a quarter of the CPU time that the
hub's own client takes.

`HF_ENDPOINT`, `HF_HUB_OFFLINE` and the token (`HF_TOKEN`, or the one `hf auth login` stored) are
looked up when they are needed. Publishing to the hub goes through git commits, and is not done here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from obstore.exceptions import BaseError

from headrace.cache.errors import (
    AccessDenied,
    HeadraceError,
    NotFound,
    OriginChanged,
    OriginError,
    OriginMisconfigured,
    OriginUnavailable,
    UsageError,
)
from headrace.cache.origins import stores, translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.reference import Reference

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import HTTPStore
    from typing_extensions import Buffer

ENDPOINT = "https://huggingface.co"
PIECE = 4 << 20
THREADS = 8  # the hub's API only; bytes are read without threads
LISTING_TIMEOUTS = 4  # the hub's client has no timeout for its listing, which may take several requests
_KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}
_TRUE = frozenset({"1", "on", "yes", "true"})

T = TypeVar("T")


def open(reference: Reference, options: OriginOptions) -> HubOrigin:
    """The origin of an `hf://` reference.

    Raises:
        UsageError: no repository is named.
    """
    return HubOrigin(reference, options)


class HubOrigin:
    """A repository of the hub, or a directory or file in one, at one revision."""

    notices_stalls = True

    def __init__(self, reference: Reference, options: OriginOptions) -> None:
        self._uri = reference.uri
        self._revision = reference.revision
        self._options = options
        self._kind, self._repository, self._below = _split(reference)
        self._name = self._below.rpartition("/")[2]
        self._single: bool | None = None
        self._places: dict[tuple[str, str], asyncio.Task[HTTPStore]] = {}
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="headrace-hub")

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Listing:
        """The files of the revision, pinned to the commit that it means now.

        Raises:
            NotFound: no such repository, revision, directory or file.
            AccessDenied: the repository is gated or private, and the token has no access.
            OriginMisconfigured: `HF_HUB_OFFLINE` is set.
        """
        limit = LISTING_TIMEOUTS * self._options.first_byte_timeout
        try:
            async with asyncio.timeout(limit):
                return await self._threaded(self._list, self._uri)
        except TimeoutError:
            raise OriginUnavailable(f"the hub did not list {self._uri} within {limit:g} seconds.") from None

    async def stat(self, path: str) -> OriginFile | None:
        """One file with its pin; None if it does not exist in the revision."""
        return await self._threaded(lambda: self._stat(path), self._child_uri(path))

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) of the file in the pinned commit, in pieces of 4 MiB.

        Raises:
            OriginChanged: a mirror answers with another commit or size.
        """
        if start >= stop:
            return
        commit, path, size = file.pin.value, file.path, file.size
        uri = self._child_uri(path)
        # A whole file is asked for without a range: small files come from servers that need not know ranges.
        wanted: GetOptions = {} if (start, stop) == (0, size) else {"range": (start, stop)}
        for last in (False, True):
            place = self._place(commit, path)
            # Shielded: a reader that is cancelled leaves the others their answer.
            store = await asyncio.shield(place)
            try:
                result = await store.get_async("", options=wanted)
            except (BaseError, OSError) as error:
                refused = translate.foreign(error, uri)
                if last or not isinstance(refused, AccessDenied | NotFound):
                    raise refused from None  # obstore's text holds the signed URL
                # The signature or the token expired (the hub then denies that a private file exists): ask the
                # hub anew, once for all readers.
                if self._places.get((commit, path)) is place:
                    del self._places[commit, path]
                continue
            break
        if result.meta["size"] != size:
            raise OriginChanged(
                f"{uri} is {result.meta['size']} bytes long where the commit {commit[:12]} says {size}: "
                "a proxy or mirror may be out of date."
            )
        try:
            async for piece in result.stream(min_chunk_size=PIECE):
                yield piece
        except (BaseError, OSError) as error:
            raise translate.foreign(error, uri) from None

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """A small file whole; None if it does not exist in the revision."""
        file = await self.stat(path)
        if file is None:
            return None
        if file.size > limit:
            raise OriginError(
                f"{self._child_uri(path)} is {file.size} bytes long, over the limit of {limit} for such a file."
            )
        return b"".join([bytes(memoryview(piece)) async for piece in self.read(file, 0, file.size)])

    async def put(self, path: str, source: str) -> None:
        raise self._not_writable()

    async def put_bytes(self, path: str, data: bytes) -> None:
        raise self._not_writable()

    async def close(self) -> None:
        for task in self._places.values():
            task.cancel()
        await asyncio.gather(*self._places.values(), return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _not_writable(self) -> UsageError:
        return UsageError(
            f"{self._uri} cannot be published to: upload with `hf upload`, or publish to an object store."
        )

    def _child_uri(self, path: str) -> str:
        return self._uri if self._single and path == self._name else f"{self._uri}/{path}"

    def _in_repository(self, path: str, api: huggingface_hub.HfApi, commit: str) -> str:
        """Where `path` lies; asks, the first time, whether the reference is itself a file of that name."""
        if not self._below:
            return path
        if path == self._name and self._single is None:
            self._single = isinstance(self._entry(api, self._below, commit), RepoFile)
        return self._below if self._single and path == self._name else f"{self._below}/{path}"

    def _entry(self, api: huggingface_hub.HfApi, path: str, commit: str) -> RepoFile | RepoFolder | None:
        found = api.get_paths_info(self._repository, [path], revision=commit, repo_type=self._kind)
        return found[0] if found else None

    def _api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(endpoint=self._endpoint(), token=self._token() or False)

    def _endpoint(self) -> str:
        if any(os.environ.get(n, "").lower() in _TRUE for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
            raise OriginMisconfigured(
                f"{self._uri} is not asked for, as HF_HUB_OFFLINE is set: unset it, or use what is staged."
            )
        return (self._options.endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")

    def _token(self) -> str | None:
        return None if self._options.anonymous else huggingface_hub.get_token()

    async def _threaded(self, job: Callable[[], T], uri: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except HeadraceError:
            raise
        except Exception as error:  # the hub's client has errors of several HTTP libraries, by its version
            raise self._translated(error, uri) from error

    def _translated(self, error: BaseException, uri: str) -> HeadraceError:
        """The hub's own ways to say no; the rest are translated as for every origin."""
        page = f"{self._options.endpoint or os.environ.get('HF_ENDPOINT') or ENDPOINT}/{self._repository}"
        if isinstance(error, GatedRepoError):
            return AccessDenied(
                f"{uri} is gated: ask for access at {page}, and set HF_TOKEN to a token of that account."
            )
        if isinstance(error, DisabledRepoError):
            return AccessDenied(f"{uri} was disabled by the hub: see {page}.")
        if isinstance(error, RevisionNotFoundError):
            return NotFound(
                f"{self._uri} has no revision {self._revision or 'main'!r}: check what follows the '@'."
            )
        if isinstance(error, RepositoryNotFoundError):
            if self._token() is None:
                return AccessDenied(
                    f"{uri} does not exist or is private: check the name, or set HF_TOKEN to a token that may read it."
                )
            return NotFound(
                f"{uri} does not exist, or the token in use may not see it: check the name and HF_TOKEN."
            )
        if isinstance(error, EntryNotFoundError):
            return NotFound(f"{uri} does not exist in the revision: check the path.")
        if isinstance(error, HFValidationError):
            return UsageError(f"{uri} is not the name of a repository: give hf://org/name.")
        return translate.foreign(error, uri)

    def _commit(self, api: huggingface_hub.HfApi) -> str:
        info = api.repo_info(
            self._repository,
            revision=self._revision,
            repo_type=self._kind,
            timeout=self._options.first_byte_timeout,
        )
        if not info.sha:
            raise OriginError(
                f"{self._uri}: the hub named no commit for the revision {self._revision or 'main'!r}."
            )
        return info.sha

    def _list(self) -> Listing:
        api = self._api()
        commit = self._commit(api)
        if self._below:
            found = self._entry(api, self._below, commit)
            if found is None:
                raise NotFound(f"{self._uri} does not exist in the revision {commit[:12]}: check the path.")
            self._single = isinstance(found, RepoFile)
            if isinstance(found, RepoFile):
                return Listing(self._uri, (_describe(found, self._name, commit),), commit, single=True)
        entries = api.list_repo_tree(
            self._repository, self._below or None, recursive=True, revision=commit, repo_type=self._kind
        )
        skipped = len(self._below) + 1 if self._below else 0
        files = [_describe(e, e.path[skipped:], commit) for e in entries if isinstance(e, RepoFile)]
        if not files:
            raise NotFound(f"{self._uri} holds no file in the revision {commit[:12]}.")
        return Listing(self._uri, tuple(sorted(files, key=lambda file: file.path)), commit)

    def _stat(self, path: str) -> OriginFile | None:
        api = self._api()
        commit = self._commit(api)
        entry = self._entry(api, self._in_repository(path, api, commit), commit)
        return _describe(entry, path, commit) if isinstance(entry, RepoFile) else None

    def _place(self, commit: str, path: str) -> asyncio.Task[HTTPStore]:
        """Where the bytes are, asked once however many ranges are read at once."""
        task = self._places.get((commit, path))
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            resolving = self._threaded(lambda: self._resolve(commit, path), self._child_uri(path))
            task = self._places[commit, path] = asyncio.create_task(resolving)
        return task

    def _resolve(self, commit: str, path: str) -> HTTPStore:
        endpoint, token = self._endpoint(), self._token()
        there = self._in_repository(path, self._api(), commit)
        url = huggingface_hub.hf_hub_url(
            self._repository, there, repo_type=self._kind, revision=commit, endpoint=endpoint
        )
        found = huggingface_hub.get_hf_file_metadata(
            url, token=token or False, timeout=self._options.first_byte_timeout, endpoint=endpoint
        )
        if found.commit_hash and found.commit_hash != commit:
            raise OriginChanged(
                f"{self._child_uri(path)} was answered from commit {found.commit_hash[:12]}, not {commit[:12]}: "
                "a proxy or mirror may be out of date."
            )
        ours = urlsplit(found.location)[:2] == urlsplit(endpoint)[:2]
        # The token goes to the hub alone, never to the host that it redirects to.
        secret = (("authorization", f"Bearer {token}"),) if ours and token else ()
        options = replace(self._options, endpoint=None, headers=(*self._options.headers, *secret))
        return stores.by_url(found.location, options)


def _split(reference: Reference) -> tuple[str, str, str]:
    """Kind, repository and the path below it."""
    parts = reference.location.split("/")
    kind = _KINDS.get(parts[0]) if len(parts) > 1 else None
    if kind is not None:
        parts = parts[1:]
    if any(not part or part in (".", "..") for part in parts):
        raise UsageError(f"{reference.uri} is not the name of a repository: give hf://org/name.")
    return kind or "model", "/".join(parts[:2]), "/".join(parts[2:])


def _describe(entry: RepoFile, path: str, commit: str) -> OriginFile:
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs is not None else None
    return OriginFile(path, entry.size, Pin("commit", commit), digest)
