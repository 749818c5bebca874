"""Objects that are open for uploads: what of them may be read, and that it is still the object.

Nothing is locked: an evictor or a repair is never kept waiting. A folder is opened once and everything in it through
that descriptor, so that map and bytes are of the same object whatever happens to the path; each request then compares
inodes, and opens again what was evicted, completed or repaired meanwhile. Descriptors that nobody uses are closed
after seconds, because an evicted object's space is free only then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.cache.chunkmap import ChunkMap
from headrace.cache.errors import HeadraceError, PeerMissing
from headrace.cache.grid import Grid
from headrace.cache.object import ObjectFolder, ObjectSpec, learned_digests

KEEP = 2.0
"""Seconds that an object stays open after its last use."""

_MOST = 256


class OpenObject:
    """One object's descriptors. `grid` and `algorithm` are its own."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: of its folder.

        Raises:
            PeerMissing: there is no such object, or it is damaged.
        """
        self._path = path
        self._map: ChunkMap | None = None
        self._fd = -1
        self.users = 0
        self.used = 0.0
        self.kept = False
        try:
            self._folder_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise PeerMissing("this node does not have the object.") from None
        # The very folder, even when its path means another one by now.
        self._folder = ObjectFolder(Path(f"/proc/self/fd/{self._folder_fd}"))
        try:
            self._open()
        except FileNotFoundError:
            self.close()
            raise PeerMissing("this node does not have the object any more.") from None
        except HeadraceError:
            self.close()
            raise PeerMissing("this node's object is damaged.") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._spec: ObjectSpec = self._folder.spec()
        try:
            self._fd = os.open(self._folder.data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._open_partial()
        if os.fstat(self._fd).st_size != self._spec.size:
            raise PeerMissing("this node's object is damaged.")

    def _open_partial(self) -> None:
        """What is filling. Once `data` exists, `partial` is a repair's scratch: so the last look is for that."""
        self._map = ChunkMap.open(self._folder.map, writable=False)
        with suppress(FileNotFoundError):
            self._fd = os.open(self._folder.partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            complete = os.open(self._folder.data, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if self._fd < 0:
                raise
            if self._map.count != len(self._spec.grid):
                raise PeerMissing("this node's object is damaged.") from None
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = complete
        self._map.close()
        self._map = None

    @property
    def grid(self) -> Grid:
        return self._spec.grid

    @property
    def algorithm(self) -> str:
        """Of the chunks' digests."""
        return self._spec.algorithm

    def fileno(self) -> int:
        return self._fd

    def ready(self, first: int, last: int) -> bool:
        """Whether the chunks [first, last) are there and verified."""
        return last <= len(self._spec.grid) and (self._map is None or self._map.ready(first, last))

    def digests(self, first: int, last: int) -> list[bytes]:
        """Learned digests of chunks.

        Raises:
            PeerMissing: one is unknown.
        """
        try:
            found = learned_digests(self._folder, last)[first:]
        except (FileNotFoundError, HeadraceError):
            found = []
        digests = [d for d in found if d is not None]
        if len(digests) != last - first:
            raise PeerMissing("this node does not know the digests.")
        return digests

    def same(self) -> bool:
        """Whether the path still means what is open here."""
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._folder_fd)):
                return False
        except FileNotFoundError:
            return False
        try:
            found = os.stat(self._folder.data)
        except FileNotFoundError:
            return self._map is not None
        return self._map is None and os.path.samestat(found, os.fstat(self._fd))

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        for fd in (self._fd, self._folder_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder_fd = -1


class OpenObjects:
    """The objects that uploads read now or a moment ago; used from any thread."""

    def __init__(self, keep: float = KEEP) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._open: dict[str, OpenObject] = {}
        self._sweeping = False

    @contextmanager
    def use(self, path: str) -> Iterator[OpenObject]:
        """The object in a folder, as it is now; it stays open for the time of the block.

        Raises:
            PeerMissing: not here.
        """
        found = self._found(path)
        if found is None:
            found = OpenObject(path)
            self._keep_open(path, found)
        try:
            yield found
        finally:
            self._leave(found)

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._open)

    def close(self) -> None:
        """Nothing may be in use."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _found(self, path: str) -> OpenObject | None:
        with self._lock:
            found = self._open.get(path)
            if found is None:
                return None
            found.users += 1
        if found.same():
            return found
        with self._lock:
            if self._open.get(path) is found:
                del self._open[path]
            found.kept = False
        self._leave(found)
        return None

    def _keep_open(self, path: str, one: OpenObject) -> None:
        with self._lock:
            one.users = 1
            # Another thread may have opened the same; then this one lasts for one use.
            one.kept = path not in self._open and len(self._open) < _MOST
            if not one.kept:
                return
            self._open[path] = one
            if self._sweeping:
                return
            self._sweeping = True
        threading.Thread(target=self._sweep, name="headrace-opened", daemon=True).start()

    def _leave(self, one: OpenObject) -> None:
        with self._lock:
            one.users -= 1
            one.used = time.monotonic()
            if not one.users and not one.kept:
                one.close()

    def _sweep(self) -> None:
        """Runs only while something is open."""
        while True:
            time.sleep(self._keep / 2)
            with self._lock:
                now = time.monotonic()
                for path, one in list(self._open.items()):
                    if not one.users and now - one.used >= self._keep:
                        del self._open[path]
                        one.close()
                if not self._open:
                    self._sweeping = False
                    return
