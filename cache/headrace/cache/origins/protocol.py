"""What an origin is to the rest of headrace.

An adapter (one per kind of origin) does single attempts and translates foreign errors into ours;
`RetryingOrigin` around it does timeouts, backoff and resumption, once, for every kind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer  # in collections.abc only from Python 3.12 on


@dataclass(frozen=True, slots=True)
class Pin:
    """The version that every read of a file is held to.

    Attributes:
        kind: "version", "generation", "etag", "commit", "mtime" or "size", strongest first.
        value: as the origin spells it (an ETag without its quotes).
    """

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


@dataclass(frozen=True, slots=True)
class OriginFile:
    """One file of a listing.

    Attributes:
        path: POSIX path relative to the reference.
        size: bytes.
        pin: the version that was listed.
        digest: "sha256:<hex>" of the whole file where the origin publishes one.
    """

    path: str
    size: int
    pin: Pin
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a reference points to now.

    Attributes:
        uri: canonical URI without the revision.
        revision: the resolved revision (a commit), where the origin has revisions.
        files: sorted by path.
        single: True when the reference named a single object rather than a prefix.
    """

    uri: str
    files: tuple[OriginFile, ...]
    revision: str | None = None
    single: bool = False


class Origin(Protocol):
    """One reference's origin. Not shared between event loops; `close` when done."""

    @property
    def uri(self) -> str:
        """Canonical URI of the reference, without the revision."""
        ...

    async def list(self) -> Listing:
        """Every file under the reference, pinned. A reference to one object lists that object.

        Raises:
            NotFound: nothing is there.
        """
        ...

    def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) of exactly the pinned version, in order, in pieces of a few MiB.

        The pieces add up to stop - start, or an error is raised.

        Raises:
            OriginChanged: the object is no longer the pinned version.
        """
        ...

    async def stat(self, path: str) -> OriginFile | None:
        """One file, pinned, without listing (files that a published manifest names); None if absent.

        Raises:
            OriginError: refused, or not reachable.
        """
        ...

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """A small file whole and unpinned (a published manifest); None if it does not exist.

        Raises:
            OriginError: larger than `limit` bytes.
        """
        ...

    async def put(self, path: str, source: str) -> None:
        """Upload the local file `source` as `path`, replacing what is there.

        Raises:
            UsageError: this kind of origin cannot be published to.
        """
        ...

    async def put_bytes(self, path: str, data: bytes) -> None:
        """Upload `data` as `path`, atomically."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class DirectReads(Protocol):
    """What an adapter may have beside `Origin`: a cheaper way for the bytes than through the event loop."""

    async def read_to(
        self, file: OriginFile, start: int, stop: int, put: Callable[[memoryview], None]
    ) -> bool:
        """Call `put` in a thread with the bytes [start, stop), in order; what it gets changes once it returns.

        Cancelled, it returns when nothing is put any more.

        Returns:
            False: nothing was put, and `read` should be asked.

        Raises:
            OriginChanged: the object is no longer the pinned version.
            OriginUnavailable: the connection failed midway.
        """
        ...
