"""The fsspec scheme `headrace::`: any origin's files, read through the store.

>>> import fsspec                                                                   # doctest: +SKIP
>>> with fsspec.open("headrace::s3://models/llama-3-8b/config.json") as file: ...   # doctest: +SKIP

Reads come from the store; what is not there yet is staged first, chunk by chunk, verified. Listings are
those of the revision that is read. Nothing can be written.

What is staged as one, a *model*, is what was named: the `model` option, else the path with which the
filesystem was made, or the nearest folder that was listed here or that the store knows, else the path itself.
"""

from __future__ import annotations

import errno
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar

from fsspec.core import get_filesystem_class
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import stringify_path

from headrace.cache.errors import AccessDenied, HeadraceError, NotFound, NotStaged, UsageError
from headrace.cache.manifest import ManifestFile
from headrace.cache.ondemand import OnDemand, Place, ReadInParts
from headrace.cache.origins.options import OriginOptions
from headrace.cache.snapshot import Selection

MOST_MODELS = 16
"""So many models' listings are kept at once."""

_CHAIN = "headrace::"
_LOCAL = ("file", "local")


class HeadraceFileSystem(ChainedFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only filesystem over the store.

    Args:
        target_protocol: the origin's scheme. Without one, paths are URIs.
        target_options: what fsspec's own filesystem for it would be given: endpoint_url, anon, profile,
            requester_pays and client_kwargs with endpoint_url and region_name are understood. Keys are not:
            they come from the environment, as everywhere in headrace.
        fo: the path that was asked for first.
        model: path of what is staged as one.
        root, domain, revalidate, include, ignore: as for `headrace stage`.

    Raises:
        UsageError: an option that means nothing here.
    """

    protocol: ClassVar[str] = "headrace"
    root_marker = ""

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fo: str | None = None,
        model: str | None = None,
        root: str | None = None,
        domain: str | None = None,
        revalidate: str | None = None,
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
        **storage_options: Any,
    ) -> None:
        super().__init__(**storage_options)
        self._target = target_protocol
        if target_protocol is not None:
            target = get_filesystem_class(target_protocol)
            # An instance knows how its target spells paths; fsspec's own methods ask it, not the class.
            self.__dict__["_strip_protocol"] = lambda path: _strip(path, target._strip_protocol)
        self._first = None if fo is None else self._strip_protocol(fo)
        self._model = None if model is None else self._strip_protocol(model)
        understood = _origin_options(target_protocol, target_options or {})
        selection = Selection(tuple(include), tuple(ignore))
        self._place = Place(root, domain, revalidate, selection, understood)
        self._models: OrderedDict[str, _Tree] = OrderedDict()
        self._lock = threading.RLock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return _strip(path, lambda inner: inner.rstrip("/"))

    @property
    def fsid(self) -> str:
        return "headrace"

    def unstrip_protocol(self, name: str) -> str:
        """The path as a chained URL."""
        return _CHAIN + self._uri(self._strip_protocol(name))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings: the next call asks again what references point to."""
        with self._lock:
            while self._models:
                self._models.popitem()[1].model.close()
        super().invalidate_cache(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Files and folders directly below `path`; a file lists itself.

        Raises:
            FileNotFoundError: nothing is there.
        """
        tree, inside = self._locate(path)
        found = [tree.info(entry) for entry in tree.children(inside)]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size and type; of a file also its content key, of both the snapshot's id.

        Raises:
            FileNotFoundError: nothing is there.
        """
        tree, inside = self._locate(path)
        return tree.info(inside)

    def ukey(self, path: str) -> str:
        """Differs whenever the bytes may: the content key."""
        return str(self.info(path)["content_key"])

    def checksum(self, path: str) -> int:
        return int.from_bytes(self.ukey(path).encode()[-15:], "big")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """A file's bytes, or a part; negative positions count from the end."""
        with self._opened(path) as file:
            return file.read(*_range(file.size, start, end))

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Parts of files. All of them are asked for before the first one is waited for."""
        if not isinstance(paths, list):
            raise TypeError("paths have to be a list")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError("paths, starts and ends have to be of the same length")
        ranges = list(zip(paths, starts, ends, strict=True))
        opened: dict[str, ReadInParts] = {}
        results: list[Any] = []
        try:
            with suppress(OSError, HeadraceError):  # below it is asked again, and reported
                for path, start, end in ranges:
                    file = opened.get(path) or opened.setdefault(path, self._open_model_file(path))
                    file.want(*_range(file.size, start, end))
            for path, start, end in ranges:
                try:
                    file = opened.get(path) or opened.setdefault(path, self._open_model_file(path))
                    results.append(file.read(*_range(file.size, start, end)))
                except (OSError, HeadraceError) as error:
                    if on_error != "return":
                        raise
                    results.append(error)
        finally:
            for file in opened.values():
                file.close()
        return results

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Mapping[str, Any] | None = None,
        cache_type: str = "none",
        **_: Any,
    ) -> OpenedFile:
        if mode != "rb":
            self._refuse(path)
        stored = self._open_model_file(path)
        return OpenedFile(self, path, stored, block_size or self.blocksize, cache_type, cache_options)

    # -- writing ------------------------------------------------------------------------------------------

    def _refuse(self, *paths: Any, **_: Any) -> Any:
        first = next((path for path in paths if isinstance(path, str)), "")
        raise OSError(
            errno.EROFS,
            f"headrace:: is read-only: write {first or 'it'} at its origin, or use `headrace publish`",
        )

    mkdir = makedirs = rmdir = rm = rm_file = _rm = cp_file = copy = mv = _refuse
    put = put_file = pipe = pipe_file = touch = write_text = write_bytes = _refuse

    # -- models -------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, path: str) -> Iterator[ReadInParts]:
        file = self._open_model_file(path)
        try:
            yield file
        finally:
            file.close()

    def _open_model_file(self, path: str) -> ReadInParts:
        tree, inside = self._locate(path)
        if inside in tree.folders:
            raise IsADirectoryError(errno.EISDIR, f"{path} is a folder")
        with _as_os_errors(path):
            try:
                return tree.model.open(tree.files[inside].path)
            except NotStaged:  # nobody read it, so it was evicted: once more from the beginning
                with self._lock:
                    self._models.pop(tree.top, None)
                tree, inside = self._locate(path)
                return tree.model.open(tree.files[inside].path)

    def _locate(self, path: str) -> tuple[_Tree, str]:
        """The model that a path belongs to, and where in it.

        Raises:
            FileNotFoundError: nothing is there.
        """
        path = self._strip_protocol(path)
        with self._lock, _as_os_errors(path):
            top = self._top(path)
            tree = self._models.get(top)
            if tree is None:
                tree = self._models[top] = _Tree(top, OnDemand(self._uri(top), self._place))
                while len(self._models) > MOST_MODELS:
                    self._models.popitem(last=False)[1].model.close()
            self._models.move_to_end(top)
        inside = path[len(top) :].strip("/")
        if inside not in tree.files and inside not in tree.folders:
            raise FileNotFoundError(errno.ENOENT, f"{path} is not there, or not part of what is staged")
        return tree, inside

    def _top(self, path: str) -> str:
        """The path of the model that `path` belongs to."""
        if self._model is not None:
            if path == self._model or path.startswith(self._model.rstrip("/") + "/"):
                return str(self._model)
            raise FileNotFoundError(errno.ENOENT, f"{path} is not part of {self._model}")
        above = list(_ancestors(path))
        known = next((place for place in above if place in self._models), None)
        if known is not None:
            return known
        if self._first in above[1:]:
            return str(self._first)
        return next((place for place in above if self._place.remembers(self._uri(place))), path)

    def _uri(self, path: str) -> str:
        if self._target is None or "://" in path:
            return path
        return f"{self._target}://{path if self._target in _LOCAL else path.lstrip('/')}"


class OpenedFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file opened for reading."""

    def __init__(
        self,
        fs: HeadraceFileSystem,
        path: str,
        stored: ReadInParts,
        block_size: int,
        cache_type: str,
        cache_options: Mapping[str, Any] | None,
    ) -> None:
        self._stored = stored
        super().__init__(
            fs, path, "rb", block_size,
            cache_type=cache_type, cache_options=dict(cache_options or {}), size=stored.size,
        )  # fmt: skip

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._stored.read(start, end)

    def close(self) -> None:
        super().close()
        self._stored.close()


class _Tree:
    """A model's files and folders, by their paths within it; "" is the model itself."""

    def __init__(self, top: str, model: OnDemand) -> None:
        self.top = top
        self.model = model
        self.files: dict[str, ManifestFile] = dict(model.manifest.by_path)
        self.folders: dict[str, set[str]] = {"": set()}
        if list(self.files) == [posixpath.basename(top)]:
            # The reference names one object, which is listed under its own name.
            self.files = {"": next(iter(self.files.values()))}
            self.folders = {}
            return
        for path in self.files:
            while path:
                above = posixpath.dirname(path)
                self.folders.setdefault(above, set()).add(path)
                path = above

    def children(self, inside: str) -> list[str]:
        return sorted(self.folders[inside]) if inside in self.folders else [inside]

    def info(self, inside: str) -> dict[str, Any]:
        name = f"{self.top.rstrip('/')}/{inside}" if inside else self.top
        shared = {"name": name, "snapshot": self.model.snapshot}
        if inside in self.folders:
            return {**shared, "size": 0, "type": "directory"}
        file = self.files[inside]
        return {**shared, "size": file.size, "type": "file", "content_key": self.model.content_key(file)}


def _strip(path: Any, inner: Callable[[str], str]) -> Any:
    if isinstance(path, list):
        return [_strip(one, inner) for one in path]
    text = str(stringify_path(path))
    for start in (_CHAIN, "headrace://"):
        text = text.removeprefix(start)
    return inner(text) if text else ""


def _ancestors(path: str) -> Iterator[str]:
    """The path and what is above it, nearest first."""
    while path and path != "/" and not path.endswith(":"):
        if not path.endswith("/"):  # "s3://" is no place
            yield path
        path = path.rpartition("/")[0]


def _range(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """What callers of a filesystem expect to catch; other errors stay headrace's."""
    try:
        yield
    except (NotFound, NotStaged) as error:
        raise FileNotFoundError(errno.ENOENT, f"{path}: {error}") from error
    except AccessDenied as error:
        raise PermissionError(errno.EACCES, f"{path}: {error}") from error


def _origin_options(
    protocol: str | None, given: Mapping[str, Any]
) -> Callable[[OriginOptions], OriginOptions]:
    """What `target_options` mean for headrace's own origins.

    Raises:
        UsageError: one of them means nothing.
    """
    if protocol in _LOCAL:
        return lambda options: options
    client = dict(given.get("client_kwargs") or {})
    changes = {
        "endpoint": client.pop("endpoint_url", None) or given.get("endpoint_url"),
        "region": client.pop("region_name", None),
        "anonymous": given.get("anon"),
        "profile": given.get("profile"),
        "requester_pays": given.get("requester_pays"),
    }
    names = {"client_kwargs", "endpoint_url", "anon", "profile", "requester_pays"}
    unknown = sorted({*given} - names) + sorted(f"client_kwargs[{name!r}]" for name in client)
    if unknown:
        raise UsageError(
            f"the storage option {unknown[0]} means nothing to headrace::: credentials come from the environment, "
            "other settings of an origin from the configuration file."
        )
    changed = {name: value for name, value in changes.items() if value is not None}
    return lambda options: replace(options, **changed)
