"""A model that is being staged: real files full of garbage, which a thread fills chunk by chunk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headrace.cache.errors import StagingStopped


class FillingFile:
    """One file that fills. `ready` chunks are right, all other bytes are garbage."""

    def __init__(self, path: str, location: Path, content: bytes, chunk: int) -> None:
        self.path = path
        self.size = len(content)
        self.content = content
        self.chunk = chunk
        location.write_bytes(b"\xa5" * len(content))
        self._descriptor = os.open(location, os.O_RDWR | os.O_CLOEXEC)
        self._change = threading.Condition()
        self._ready: set[int] = set()
        self._stopped = False
        self.wanted: list[tuple[int, int]] = []
        self.before_read: Callable[[], None] | None = None

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk)

    def stage(self, number: int) -> None:
        """Write chunk `number`, then mark it."""
        start = number * self.chunk
        os.pwrite(self._descriptor, self.content[start : start + self.chunk], start)
        with self._change:
            self._ready.add(number)
            self._change.notify_all()

    def stop(self) -> None:
        """Nobody stages any more."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def fileno(self) -> int:
        if self.before_read is not None:
            self.before_read()
        return self._descriptor

    @property
    def complete(self) -> bool:
        return len(self._ready) == self.chunks

    def ready(self, start: int, stop: int) -> bool:
        if stop > self.size:
            raise AssertionError(f"asked about bytes {start}-{stop} of {self.size}")
        last = max(start, stop - 1) // self.chunk if stop > start else start // self.chunk - 1
        return all(number in self._ready for number in range(start // self.chunk, last + 1))

    def wait(self, start: int, stop: int, timeout: float | None = None) -> None:
        with self._change:
            self.wanted.append((start, stop))
            self._change.wait_for(lambda: self._stopped or self.ready(start, stop), timeout)
            if self._stopped and not self.ready(start, stop):
                raise StagingStopped(f"{self.path}: nobody stages bytes {start}-{stop}; stage it again")

    def close(self) -> None:
        """The source closes the descriptor: staging may go on after the loader is done."""


class FillingSource:
    """Files by path; see `FillingFile`. Use as a context manager."""

    snapshot: str | None = None

    def __init__(self, folder: Path, files: Mapping[str, bytes], chunk: int) -> None:
        self.name = "filling"
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {
            path: FillingFile(path, folder / f"{number}.partial", content, chunk)
            for number, (path, content) in enumerate(sorted(files.items()))
        }

    def all_chunks(self) -> list[tuple[str, int]]:
        return [(path, number) for path, file in self.files.items() for number in range(file.chunks)]

    def stage_in_background(self, order: Sequence[tuple[str, int]]) -> threading.Thread:
        """Stage these chunks one after another, then stop."""

        def run() -> None:
            for path, number in order:
                self.files[path].stage(number)
            for file in self.files.values():
                file.stop()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def paths(self) -> tuple[str, ...]:
        return tuple(self.files)

    def open(self, path: str) -> FillingFile:
        return self.files[path]

    def close(self) -> None:
        for file in self.files.values():
            os.close(file._descriptor)

    def __enter__(self) -> FillingSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
