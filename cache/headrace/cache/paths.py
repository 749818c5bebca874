"""Which relative paths a manifest, a listing or an archive may name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from headrace.cache.errors import UnsafePath

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255
MAX_FILES = 200_000
MAX_FILE_BYTES = 1 << 50


def check_path(path: str, where: str) -> str:
    """Return `path` if it is a plain relative POSIX path.

    Raises:
        UnsafePath: absolute, empty, `.`/`..`/empty parts, control characters, a backslash, text that
            is not valid Unicode, or longer than file systems allow.
    """

    def refuse(why: str) -> UnsafePath:
        return UnsafePath(f"{where} names the path {path!r}, which {why}; nothing was written.")

    if not path:
        raise refuse("is empty")
    if path.startswith("/"):
        raise refuse("is absolute")
    if any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise refuse("contains control characters")
    if "\\" in path:
        raise refuse("contains a backslash")
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise refuse("is not valid Unicode") from None
    if len(encoded) > MAX_PATH_BYTES:
        raise refuse(f"is longer than {MAX_PATH_BYTES} bytes")
    for name in path.split("/"):
        if name in ("", ".", ".."):
            raise refuse(f"has the part {name!r}")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise refuse(f"has a name longer than {MAX_NAME_BYTES} bytes")
    return path


def check_size(path: str, size: int, where: str) -> int:
    """Return `size` if a file may be that large.

    Raises:
        UnsafePath: negative, or over 1 PiB.
    """
    if not 0 <= size <= MAX_FILE_BYTES:
        raise UnsafePath(
            f"{where} gives {path!r} the size {size}, which no model file has; nothing was written."
        )
    return size


def check_tree(paths: Iterable[str], where: str) -> None:
    """Check every path, and that they can lie in one directory together.

    Raises:
        UnsafePath: a bad path, duplicates, names that differ only in case or Unicode form, or a file
            that is also a directory of another.
    """
    seen: dict[str, str] = {}
    files: set[str] = set()
    for count, path in enumerate(paths, 1):
        if count > MAX_FILES:
            raise UnsafePath(f"{where} names more than {MAX_FILES} files; nothing was written.")
        check_path(path, where)
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            other = seen[folded]
            how = "twice" if other == path else f"and {other!r}, which differ only in case or Unicode form"
            raise UnsafePath(f"{where} names {path!r} {how}; nothing was written.")
        seen[folded] = path
        files.add(path)
    for path in files:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in files:
                raise UnsafePath(
                    f"{where} names {parent!r} both as a file and as a folder; nothing was written."
                )
            parent = parent.rpartition("/")[0]
