"""Directories and files of this machine (`file://` and bare paths) as an origin.

A file is pinned by its modification time, size and inode. Every piece opens the file anew and
compares the pin on the open descriptor before and after the bytes are read, so a file that is
rewritten in place or replaced by rename is noticed, whichever happens first.

Symbolic links are followed only inside the directory that is read. A Hugging Face cache is the
exception that needs them: its `snapshots/<commit>/<file>` point to `../../blobs/<id>`, so for a
snapshot directory links may lead anywhere inside that model's cache folder, and a blob named by a
sha256 gives the file its digest.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import stat as modes
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from headrace.cache.errors import Interrupted, NotFound, OriginChanged, OriginError, UnsafePath, UsageError
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile, Pin
from headrace.cache.reference import Reference

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Fresh buffers of this size: measured from the page cache into a preallocated file, 4 and 8 MiB cost
# 0.44 CPU s/GB where 1 MiB costs 0.57; buffers kept for reuse were no cheaper, as the allocator
# hands the same pages out again.
PIECE = 4 << 20
THREADS = 16
_TEMPORARY = ".headrace-put-"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_FOLDER = re.compile(r"(models|datasets|spaces)--.+")

T = TypeVar("T")


def open(reference: Reference, options: OriginOptions) -> LocalOrigin:
    """The origin of a `file://` reference."""
    return LocalOrigin(reference)


class LocalOrigin:
    """A directory, or a single file, of this machine."""

    def __init__(self, reference: Reference) -> None:
        self._uri = reference.uri
        self._location = reference.location
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="headrace-local")

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Listing:
        """Walk the directory; a reference to a file lists that file under its own name.

        Raises:
            NotFound: no such path, no file in it, or a dangling symbolic link.
            UnsafePath: a link that leaves the directory, or something that is not a regular file.
        """
        return await self._threaded(self._list, self._uri)

    async def stat(self, path: str) -> OriginFile | None:
        """One file with its pin; None if it does not exist."""
        return await self._threaded(lambda: self._stat(path), self._child_uri(path))

    async def read(self, file: OriginFile, start: int, stop: int) -> AsyncIterator[Buffer]:
        """The bytes [start, stop) in fresh buffers of at most 4 MiB, read in threads.

        Raises:
            OriginChanged: the file is no longer the pinned one, or is gone.
        """
        target, uri = self._target(file.path), self._child_uri(file.path)
        position = start
        while position < stop:
            length = min(PIECE, stop - position)
            piece = await self._threaded(_Piece(target, uri, file.pin, position, length), uri)
            if not piece:
                return
            yield piece
            position += len(piece)

    async def fetch(self, path: str, limit: int) -> bytes | None:
        """A small file whole; None if it does not exist."""
        return await self._threaded(lambda: self._fetch(path, limit), self._child_uri(path))

    async def put(self, path: str, source: str) -> None:
        """Copy `source` to `path`: written beside it, synced, renamed into place; ends when cancelled."""
        stop = threading.Event()

        def copy(reader: BinaryIO, writer: BinaryIO) -> None:
            while piece := reader.read(PIECE):
                if stop.is_set():
                    raise Interrupted(f"the upload of {path!r} was interrupted: repeat it.")
                writer.write(piece)

        def upload() -> None:
            try:
                reader = Path(source).open("rb")  # noqa: SIM115 - closed below; only this may say "cannot be uploaded"
            except OSError as error:
                raise UsageError(f"{source} cannot be uploaded ({error.strerror}).") from error
            with reader:
                self._replace(path, lambda writer: copy(reader, writer))

        try:
            await self._threaded(upload, self._child_uri(path))
        finally:
            stop.set()

    async def put_bytes(self, path: str, data: bytes) -> None:
        """Write `data` to `path`: written beside it, synced, renamed into place."""
        await self._threaded(
            lambda: self._replace(path, lambda writer: writer.write(data)), self._child_uri(path)
        )

    async def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _threaded(self, job: Callable[[], T], uri: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except OSError as error:
            raise translate.foreign(error, uri) from error

    def _child_uri(self, path: str) -> str:
        return self._uri if os.path.isfile(self._location) else f"{self._uri}/{path}"

    def _list(self) -> Listing:
        top = _model_directory(self._location)
        if os.path.isfile(top):
            name = os.path.basename(top)
            return Listing(self._uri, (_describe(name, os.path.realpath(top)),), single=True)
        files = tuple(sorted(self._walk(top), key=lambda file: file.path))
        if not files:
            raise NotFound(f"{self._uri} does not exist or holds no file: check the path.")
        return Listing(self._uri, files)

    def _walk(self, top: str) -> Iterator[OriginFile]:
        root = os.path.realpath(top)
        bound = _bound(root)
        pending = [""]
        while pending:
            prefix = pending.pop()
            directory = os.path.join(top, prefix)
            if not os.path.isdir(directory):
                continue
            with os.scandir(directory) as entries:
                for entry in entries:
                    path = f"{prefix}{entry.name}"
                    if entry.name.startswith(_TEMPORARY):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{path}/")
                        continue
                    target = os.path.realpath(entry.path)
                    if entry.is_symlink():
                        if not _inside(target, bound):
                            raise _leaves(entry.path, target, bound)
                        if not os.path.exists(target):
                            raise NotFound(
                                f"{entry.path} is a symbolic link to {target}, which does not exist: "
                                "restore it, or complete the download that left it."
                            )
                        if os.path.isdir(target):
                            # Its files are listed where they lie; a linked directory could also be a loop.
                            raise UnsafePath(
                                f"{entry.path} is a symbolic link to a directory: stage {target} by itself, "
                                "or replace the link by the directory."
                            )
                    yield _describe(path, target)

    def _target(self, path: str) -> str:
        """Where the file `path` of the reference lies, with links resolved.

        Raises:
            UnsafePath: outside of the reference.
        """
        top = _model_directory(self._location)
        if os.path.isfile(top):
            if path != os.path.basename(top):
                raise NotFound(f"{self._uri} is a single file and holds no {path!r}.")
            return os.path.realpath(top)
        root = os.path.realpath(top)
        target = os.path.realpath(os.path.join(root, path))
        if os.path.isabs(path) or ".." in path.split("/") or not _inside(target, _bound(root)):
            raise _leaves(path, target, root)
        return target

    def _stat(self, path: str) -> OriginFile | None:
        try:
            target = self._target(path)
            return _describe(path, target) if not os.path.isdir(target) else None
        except (FileNotFoundError, NotADirectoryError, NotFound):
            return None

    def _fetch(self, path: str, limit: int) -> bytes | None:
        file = self._stat(path)
        if file is None:
            return None
        if file.size > limit:
            raise OriginError(
                f"{self._child_uri(path)} is {file.size} bytes long, over the limit of {limit} for such a file."
            )
        with Path(self._target(path)).open("rb") as reader:
            return reader.read(limit + 1)[:limit]

    def _replace(self, path: str, fill: Callable[[BinaryIO], object]) -> None:
        """A crash leaves the old file, or the new one; at most a `.headrace-put-` file stays behind."""
        if os.path.isfile(self._location):
            raise UsageError(f"{self._uri} is a file: publish to a directory.")
        target = os.path.join(self._location, path)
        if os.path.isabs(path) or ".." in path.split("/"):
            raise _leaves(path, target, self._location)
        directory = os.path.dirname(target)
        os.makedirs(directory, exist_ok=True)
        temporary = os.path.join(directory, f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            with Path(temporary).open("xb") as writer:
                fill(writer)
                writer.flush()
                os.fsync(writer.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(directory)


class _Piece:
    """One piece of a file, read by one thread; opened each time so that a cancelled reader leaks nothing."""

    def __init__(self, target: str, uri: str, pin: Pin, start: int, length: int) -> None:
        self._target, self._uri, self._pin = target, uri, pin
        self._start, self._length = start, length

    def __call__(self) -> bytes:
        try:
            descriptor = os.open(self._target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{self._uri} was deleted after it was listed: list it again.") from error
        try:
            self._check(os.fstat(descriptor))
            data = os.pread(descriptor, self._length, self._start)
            self._check(os.fstat(descriptor))
            return data
        finally:
            os.close(descriptor)

    def _check(self, status: os.stat_result) -> None:
        if (now := _pin(status)) != self._pin:
            raise OriginChanged(
                f"{self._uri} changed after it was listed (was {self._pin}, is {now}): run the command again."
            )


def _pin(status: os.stat_result) -> Pin:
    return Pin("mtime", f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}")


def _describe(path: str, target: str) -> OriginFile:
    """The file at `target`, which is no link, listed as `path`."""
    status = os.stat(target, follow_symlinks=False)
    if not modes.S_ISREG(status.st_mode):
        raise UnsafePath(f"{target} is neither a file nor a directory: remove it, or ignore {path!r}.")
    folder, name = os.path.split(target)
    blob = os.path.basename(folder) == "blobs" and _SHA256.fullmatch(name)
    return OriginFile(path, status.st_size, _pin(status), f"sha256:{name}" if blob else None)


def _model_directory(location: str) -> str:
    """`location`, or for a model's folder in a Hugging Face cache the snapshot that its `main` names."""
    if not _HUB_FOLDER.fullmatch(os.path.basename(location)):
        return location
    try:
        snapshots = sorted(os.listdir(os.path.join(location, "snapshots")))
    except (FileNotFoundError, NotADirectoryError):
        return location
    try:
        commit = Path(location, "refs", "main").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        commit = snapshots[0] if len(snapshots) == 1 else ""
    if commit not in snapshots:
        raise UsageError(
            f"{location} is a Hugging Face cache folder without a current snapshot: "
            f"name one of {location}/snapshots/ ({', '.join(snapshots) or 'none is there'})."
        )
    return os.path.join(location, "snapshots", commit)


def _bound(root: str) -> str:
    """The directory that links below `root` may not leave."""
    snapshots, _ = os.path.split(root)
    folder, name = os.path.split(snapshots)
    if name == "snapshots" and _HUB_FOLDER.fullmatch(os.path.basename(folder)):
        return folder
    return root


def _inside(target: str, bound: str) -> bool:
    return target == bound or target.startswith(bound.rstrip("/") + "/")


def _leaves(path: str, target: str, bound: str) -> UnsafePath:
    return UnsafePath(f"{path} leads to {target}, outside {bound}: copy the file to where it is wanted.")


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
