"""Reading tar archives that nobody vouches for: within limits, regular files only, damage noticed."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from headrace.cache.errors import ArchiveError
from headrace.cache.paths import check_path

_BLOCK = 1 << 20
# What tarfile may read at once for headers and long names, before it hands out a member.
_HEADERS = 4 << 20
# Below this much output, the expansion ratio says nothing.
_RATIO_FROM = 64 << 20
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may be at most.

    Attributes:
        total: bytes of the unpacked stream.
        files: members, folders included.
        single: bytes of one member.
        ratio: unpacked bytes per compressed byte, of gzip.
        reserve: bytes of the file system that stay free.
    """

    total: int = 4 << 40
    files: int = 100_000
    single: int = 1 << 40
    ratio: int = 200
    reserve: int = 64 << 20


class Unpacked(io.RawIOBase):
    """The tar's bytes, unpacked, within limits; what tarfile reads from."""

    def __init__(self, file: IO[bytes], where: str, limits: ArchiveLimits) -> None:
        super().__init__()
        self._file = file
        self._where = where
        self._limits = limits
        self._size = os.fstat(file.fileno()).st_size
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        self._unzip = gzip.GzipFile(fileobj=file, mode="rb") if compressed else None
        self.position = 0
        self.allowed = _HEADERS

    def read(self, size: int = -1) -> bytes:
        """Raises ArchiveError beyond any limit, or where the compressed bytes are damaged."""
        try:
            data = (self._unzip or self._file).read(size)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ArchiveError(
                f"{self._where} is truncated or damaged ({error}): upload the archive again."
            ) from None
        self.position += len(data)
        if self.position > self._limits.total:
            raise ArchiveError(
                f"{self._where} unpacks to more than {self._limits.total} bytes, which is the limit."
            )
        if (
            self._unzip is not None
            and self.position > _RATIO_FROM
            and self.position > self._limits.ratio * self._size
        ):
            raise ArchiveError(
                f"{self._where} unpacks to more than {self._limits.ratio} times its size, which is the limit: "
                f"it looks like a decompression bomb."
            )
        if self.position > self.allowed:
            raise ArchiveError(f"{self._where} has a member header of more than {_HEADERS} bytes.")
        return data

    def drain(self, check: Callable[[], None]) -> None:
        """Read on to the end, which also checks what gzip says about the whole."""
        self.allowed = self._limits.total
        while self.read(_BLOCK):
            check()

    def close(self) -> None:
        if self._unzip is not None:
            self._unzip.close()
        self._file.close()
        super().close()


class _Member(tarfile.TarInfo):
    """A header; where tarfile takes a damaged one for the end of the archive, an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            found = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            # The two empty blocks at the end; the class has no public name.
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(str(error)) from None
        assert isinstance(found, _Member)
        return found


def members(
    stream: Unpacked, where: str, limits: ArchiveLimits, check: Callable[[], None]
) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes] | None]]:
    """(path, header, content) of every file and folder, in order; content is valid until the next."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK, tarinfo=_Member) as archive:
            count = 0
            while (member := archive.next()) is not None:
                check()
                count += 1
                if count > limits.files:
                    raise ArchiveError(f"{where} has more than {limits.files} members, which is the limit.")
                _check_kind(member, where, limits)
                # The reading ahead of one block, and the padding, come on top of the member itself.
                stream.allowed = archive.offset + 2 * _BLOCK + _HEADERS
                path = member.name.removeprefix("./").rstrip("/") if member.isdir() else member.name
                path = path.removeprefix("./")
                if path in ("", ".") and member.isdir():
                    continue
                yield check_path(path, where), member, archive.extractfile(member)
        stream.drain(check)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ArchiveError(
            f"{where} is truncated, damaged or no tar archive ({error}): upload the archive again."
        ) from None


def _check_kind(member: tarfile.TarInfo, where: str, limits: ArchiveLimits) -> None:
    def refuse(what: str) -> ArchiveError:
        return ArchiveError(f"{where} holds {member.name!r}, {what}; nothing was extracted.")

    if member.issym() or member.islnk():
        raise refuse(f"a link to {member.linkname!r}: pack the file itself")
    if member.ischr() or member.isblk() or member.isfifo():
        raise refuse("a device or a pipe")
    if member.issparse():
        raise refuse("a sparse file: pack it without --sparse")
    if not member.isdir() and member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise refuse(f"an entry of the unknown type {member.type!r}")
    if member.size > limits.single:
        raise refuse(f"which has {member.size} bytes, more than the limit of {limits.single}")
    if member.isdir() and member.size:
        raise refuse("a folder with content")


def copy_member(
    content: IO[bytes] | None, file: Path, member: tarfile.TarInfo, where: str, check: Callable[[], None]
) -> None:
    """Write a member's content to a new file.

    Raises:
        ArchiveError: the archive ends within it.
    """
    copied = 0
    with open(file, "xb", buffering=0) as writer:
        while content is not None and (block := content.read(_BLOCK)):
            check()
            view = memoryview(block)
            while view:
                view = view[writer.write(view) :]
            copied += len(block)
    if copied != member.size:
        raise ArchiveError(f"{where} is truncated within {member.name!r}: upload the archive again.")
