"""Every error that headrace raises on purpose, and the exit code of each.

::

    HeadraceError                    1   anything below
    ├── UsageError                   2   a reference, option or argument that cannot be meant
    │   └── MissingDependency        3   an optional library is not installed
    ├── OriginError                 10   the origin refused, or answered with something unusable
    │   ├── NotFound                11   no such bucket, prefix, object, repository or revision
    │   ├── AccessDenied            12   credentials missing, wrong, expired, or without the right
    │   ├── OriginUnavailable       13   still failing after all retries, or unreachable
    │   ├── OriginChanged           14   the object is no longer the version that was pinned
    │   └── OriginMisconfigured     15   wrong region, endpoint, or a server that ignores ranges
    ├── IntegrityError              20   bytes do not match their digest
    │   ├── ManifestError           21   a manifest that is malformed or contradicts itself
    │   ├── SignatureError          22   a signature is missing, wrong, or by an unknown key
    │   ├── UnsafePath              23   a path that would leave its directory, or collide
    │   ├── CheckpointError         24   not safetensors, truncated, or an index that does not fit
    │   └── ArchiveError            25   an archive over its limits, or with links or devices
    ├── StoreError                  30   the store cannot do what was asked
    │   ├── NoSpace                 31   the file system is full, or would be
    │   ├── StoreVersion            32   written by a newer headrace
    │   ├── StoreNotWritable        33   read-only, or owned by another user
    │   ├── UnsuitableFilesystem    34   a network or FUSE file system
    │   ├── NotStaged               35   no such snapshot here, or not complete
    │   └── Held                    36   in use: a reader, a published volume or a pin
    ├── LoadError                   40   tensors could not be loaded
    │   ├── MissingTensor           41   named tensors or shards that the checkpoint lacks
    │   └── StagingStopped          42   nobody is staging what the loader waits for
    ├── ClusterError                50   what nodes do together
    │   ├── TrackerUnavailable      51   Redis or Valkey cannot be reached, or is not one that can be used
    │   ├── PeerError               52   another node cannot give what it was asked for
    │   │   ├── PeerBusy            53   it has no upload slot free
    │   │   ├── PeerMissing         54   it does not have the chunk
    │   │   └── OtherVersion        56   another node speaks another version of the peer protocol
    │   └── NotAuthenticated        55   a secret, token or certificate that is missing, wrong or expired
    ├── AgentError                  60   the node's agent
    │   ├── AgentUnavailable        61   nobody answers on its socket, or it went away midway
    │   └── NotAllowed              62   this socket has no right to that
    └── Interrupted                130   Ctrl-C or SIGTERM

Exit codes are stable. Messages are one sentence: what was wrong, where, what to do.
Foreign errors become ours in one place per seam: `origins/translate.py` for origins,
`disk.translate` for the file system.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Base of all errors here; `str()` is one sentence fit for a user."""

    exit_code: ClassVar[int] = 1


class UsageError(HeadraceError):
    exit_code = 2


class MissingDependency(UsageError):
    exit_code = 3


class OriginError(HeadraceError):
    exit_code = 10


class NotFound(OriginError):
    exit_code = 11


class AccessDenied(OriginError):
    exit_code = 12


class OriginUnavailable(OriginError):
    """What may succeed when tried again: one attempt's failure, and what is left after all retries.

    `retry_after` is how many seconds the origin asked to wait, where it did.
    """

    exit_code = 13

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OriginChanged(OriginError):
    exit_code = 14


class OriginMisconfigured(OriginError):
    exit_code = 15


class IntegrityError(HeadraceError):
    exit_code = 20


class ManifestError(IntegrityError):
    exit_code = 21


class SignatureError(IntegrityError):
    exit_code = 22


class UnsafePath(IntegrityError):
    exit_code = 23


class CheckpointError(IntegrityError):
    exit_code = 24


class ArchiveError(IntegrityError):
    exit_code = 25


class StoreError(HeadraceError):
    exit_code = 30


class NoSpace(StoreError):
    """`missing` is how many bytes short the file system is."""

    exit_code = 31

    def __init__(self, message: str, missing: int = 0) -> None:
        super().__init__(message)
        self.missing = missing


class StoreVersion(StoreError):
    exit_code = 32


class StoreNotWritable(StoreError):
    exit_code = 33


class UnsuitableFilesystem(StoreError):
    exit_code = 34


class NotStaged(StoreError):
    exit_code = 35


class Held(StoreError):
    exit_code = 36


class LoadError(HeadraceError):
    exit_code = 40


class MissingTensor(LoadError):
    """`names` are the tensors or shards that are missing."""

    exit_code = 41

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class StagingStopped(LoadError):
    exit_code = 42


class ClusterError(HeadraceError):
    exit_code = 50


class TrackerUnavailable(ClusterError):
    exit_code = 51


class PeerError(ClusterError):
    exit_code = 52


class PeerBusy(PeerError):
    """`retry_after` is how many seconds the peer asks to wait, `queue` how many uploads it had under way."""

    exit_code = 53

    def __init__(self, message: str, retry_after: float = 0.0, queue: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.queue = queue


class PeerMissing(PeerError):
    """The peer answered, and does not have it."""

    exit_code = 54


class NotAuthenticated(ClusterError):
    exit_code = 55


class OtherVersion(PeerError):
    """Of the peer protocol."""

    exit_code = 56


class AgentError(HeadraceError):
    exit_code = 60


class AgentUnavailable(AgentError):
    exit_code = 61


class NotAllowed(AgentError):
    exit_code = 62


class Interrupted(HeadraceError):
    exit_code = 130
