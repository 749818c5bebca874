"""Plain HTTP and HTTPS servers: a file by its URL, or a directory that the server lists.

The same ranged reads as from a bucket, through obstore. There is no listing in HTTP itself, so the
links of the server's index pages are followed; files that a published manifest names are read
without that.
"""

from __future__ import annotations

from typing import NoReturn
from urllib.parse import quote, unquote

import obstore

from headrace.cache.errors import NotFound, UsageError
from headrace.cache.origins import http_listing, stores, translate
from headrace.cache.origins.obstore import ObstoreOrigin, many
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, OriginFile
from headrace.cache.reference import Reference

_PAGES = (".html", ".htm", ".xhtml")


class WebOrigin(ObstoreOrigin):
    """A directory, or a single file, of an HTTP server."""

    def __init__(self, reference: Reference, options: OriginOptions) -> None:
        if "@" in reference.container:
            raise UsageError(
                f"{reference.scheme}:// URLs must not hold a user or password: use the origin's option `headers`."
            )
        if "?" in reference.location or "#" in reference.location:
            raise UsageError(
                f"the URL {reference.scheme}://{reference.location.partition('?')[0]} has a query or fragment, "
                "which cannot be told from a file's name: use a URL without."
            )
        super().__init__(reference, options)
        self._top = unquote(reference.key)

    async def list(self) -> Listing:
        """The file, if the URL names one; else what the server's index pages lead to."""
        file = await self._head(self._top) if self._top else None
        if file is not None:
            self._single = True
            return Listing(self.uri, (file,), single=True)
        self._single = False
        url = f"{self._reference.scheme}://{self._reference.container}/{quote(self._top)}"
        paths = await http_listing.list_links(url.rstrip("/") + "/", self._options)
        found = await many(self.stat, sorted(set(paths)))
        files = tuple(file for file in found if file is not None)
        if not files:
            raise NotFound(f"there is nothing at {self.uri}, or the server does not list it: check the URL.")
        return Listing(self.uri, files)

    async def _url(self, store: stores.Store, key: str) -> str | None:
        return f"{self._reference.scheme}://{self._reference.container}/{quote(key)}"

    async def put(self, path: str, source: str) -> None:
        """Not possible.

        Raises:
            UsageError: always.
        """
        self._refuse()

    async def put_bytes(self, path: str, data: bytes) -> None:
        """Not possible.

        Raises:
            UsageError: always.
        """
        self._refuse()

    async def _head(self, key: str) -> OriginFile | None:
        """The file `key`; None if there is none, or a page (a directory, or an error's) in its place."""

        async def head(store: stores.Store) -> tuple[str, OriginFile]:
            result = await obstore.get_async(store, key, options={"head": True})
            kind = str(result.attributes.get("Content-Type") or "")
            return kind, self._file(self._relative(key), result.meta)

        try:
            kind, file = await self._ask(head, self._at(key))
        except (NotFound, translate.NoLength):
            return None
        page = kind.startswith("text/html") and not key.lower().endswith(_PAGES)
        return None if page else file

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"a plain HTTP server cannot be published to: publish {self.uri} to a bucket or directory."
        )
