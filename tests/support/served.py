"""What a faulty server serves, by which faults, and what it served: all of it but the sockets."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = frozenset(
    {"status", "reset", "truncate", "stall", "latency", "throttle", "wrong_range", "wrong_length"}
    | {"ignore_range", "long_body", "replace", "corrupt", "no_etag"}
)
INVERT = bytes(255 - i for i in range(256))
_SLICE = 1 << 18
_CREDIT = 0.1  # seconds of sending that may be caught up after a delay, so that the average holds


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; see the module's table. `after`, `at`, `length` in bytes, `seconds`, `rate` in bytes/s."""

    kind: str
    path: str = "*"
    methods: tuple[str, ...] = ("GET",)
    header: tuple[str, str] | None = None
    first: int | None = None
    nth: int | None = None
    probability: float | None = None
    status: int = 500
    body: bytes | None = None
    retry_after: float | None = None
    after: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    at: int = 0
    length: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such fault: {self.kind}")


@dataclass(frozen=True, slots=True)
class Request:
    """One answered request: `start`, `stop` are the file bytes of the body that was sent."""

    method: str
    path: str
    range: str | None
    status: int
    start: int
    stop: int
    faults: tuple[str, ...]
    connection: int
    headers: Mapping[str, str]

    @property
    def sent(self) -> int:
        return self.stop - self.start


class Pace:
    """Spreads bytes over time: `take(n)` returns when n more bytes may have been sent."""

    def __init__(self, rate: float, stopping: threading.Event) -> None:
        self.rate = rate
        self._stopping = stopping
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def slice(self) -> int:
        return max(1024, min(_SLICE, int(self.rate / 50)))

    def take(self, size: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - _CREDIT) + size / self.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            self._stopping.wait(wait)


class Served:
    """The content, the faults and the log of a `FaultyServer`, which documents the arguments."""

    def __init__(
        self,
        files: Mapping[str, bytes] | None,
        directory: str | os.PathLike[str] | None,
        faults: Sequence[Fault],
        rate: float | None,
        connection_rate: float | None,
        honours_if_match: bool,
        index: bool,
        seed: int,
    ) -> None:
        self.files: dict[str, bytes] = dict(files or {})
        self.directory = Path(directory) if directory is not None else None
        self.honours_if_match = honours_if_match
        self.index = index
        self.connection_rate = connection_rate
        self.stopping = threading.Event()
        self.pace = Pace(rate, self.stopping) if rate else None
        self._log: list[Request] = []
        self._busy = 0
        self._idle = threading.Condition()
        self._faults: tuple[Fault, ...] = tuple(faults)
        self._matched: Counter[int] = Counter()
        self._etags: dict[str, tuple[int, str]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    # -- content -------------------------------------------------------------------------------

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self._faults

    @faults.setter
    def faults(self, faults: Sequence[Fault]) -> None:
        with self._lock:
            self._faults = tuple(faults)
            self._matched.clear()

    def find(self, path: str) -> bytes | Path | None:
        """What is served at `path`: bytes, a file of the directory, or None."""
        data = self.files.get(path)
        if data is not None:
            return data
        if self.directory is not None:
            file = self.directory / path
            if file.is_file() and file.resolve().is_relative_to(self.directory.resolve()):
                return file
        return None

    def etag(self, path: str, content: bytes | Path) -> str:
        if isinstance(content, Path):
            stat = content.stat()
            return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"
        known = self._etags.get(path)
        if known is None or known[0] != id(content):
            known = (id(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
            self._etags[path] = known
        return known[1]

    def links(self, path: str) -> list[str] | None:
        """The names in the directory `path` ("" or ending in "/"), sub-directories with a slash."""
        names = {
            key[len(path) :].partition("/")[0] + ("/" if "/" in key[len(path) :] else "")
            for key in self.files
            if key.startswith(path)
        }
        if self.directory is not None and (self.directory / path).is_dir():
            names |= {e.name + ("/" if e.is_dir() else "") for e in (self.directory / path).iterdir()}
        return sorted(names) or None

    # -- faults and the log --------------------------------------------------------------------

    def matching(self, method: str, path: str, headers: Mapping[str, str]) -> list[Fault]:
        """The faults of one request; counts it."""
        chosen = []
        with self._lock:
            for number, fault in enumerate(self._faults):
                if method not in fault.methods or not fnmatch.fnmatchcase(path, fault.path):
                    continue
                if fault.header is not None:
                    value = headers.get(fault.header[0].lower())
                    if value is None or not fnmatch.fnmatchcase(value, fault.header[1]):
                        continue
                self._matched[number] += 1
                count = self._matched[number]
                if fault.first is not None and count > fault.first:
                    continue
                if fault.nth is not None and count != fault.nth:
                    continue
                if fault.probability is not None and self._random.random() >= fault.probability:
                    continue
                chosen.append(fault)
        return chosen

    def busy(self, change: int) -> None:
        """A request is being answered (+1), or no longer (-1): it ended, or stalls on purpose."""
        with self._idle:
            self._busy += change
            self._idle.notify_all()

    def note(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    @property
    def log(self) -> list[Request]:
        """Every answered request, in the order in which they ended.

        A client may have its answer a moment before the server's thread has noted it, so this waits
        a little for the requests that are under way.
        """
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, 0.5)
        with self._lock:
            return list(self._log)

    def requests(self, path: str = "*", method: str = "GET") -> list[Request]:
        """The answered requests whose path matches the glob, in the order in which they ended."""
        return [r for r in self.log if r.method == method and fnmatch.fnmatchcase(r.path, path)]

    def bytes_sent(self, path: str = "*") -> int:
        """Body bytes of 200 and 206 answers written to sockets."""
        return sum(r.sent for r in self.requests(path) if r.status in (200, 206))

    def multiplicity(self, path: str) -> dict[int, int]:
        """How often the bytes of one file were sent: {times: bytes}; {1: size} is the ideal."""
        edges: Counter[int] = Counter()
        for request in self.requests(path):
            if request.status in (200, 206) and request.sent:
                edges[request.start] += 1
                edges[request.stop] -= 1
        counts: Counter[int] = Counter()
        depth, last = 0, 0
        for offset in sorted(edges):
            counts[depth] += offset - last
            depth, last = depth + edges[offset], offset
        return {times: size for times, size in counts.items() if times and size}

    def clear(self) -> None:
        """Forget the log."""
        if self.log:
            with self._lock:
                self._log.clear()
