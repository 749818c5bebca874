"""Which files lie below an `http(s)://` URL.

Plain web servers have no listing, but many show a page of links for a directory (nginx `autoindex`,
Apache `mod_autoindex`, `python -m http.server`). Such pages are walked; only links to direct children of
a page on the same host are taken. Where the URL shows no such page, the files of a checkpoint are asked
for by their usual names, and the shards by `model.safetensors.index.json`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser

from headrace.cache.errors import OriginError, OriginMisconfigured
from headrace.cache.origins import translate
from headrace.cache.origins.options import OriginOptions

MAX_PAGES = 2000
MAX_FILES = 100_000
MAX_PAGE_BYTES = 16 << 20
_INDEX = "model.safetensors.index.json"
_USUAL = (
    "config.json", "generation_config.json", "model.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


async def list_links(url: str, options: OriginOptions) -> list[str]:
    """The paths of the files below `url`, relative to it, decoded and sorted; empty if nothing is there.

    Sizes and pins are not known from links, and a shard that an index names may be missing: ask for
    each with a HEAD.

    Raises:
        OriginError: the server refuses or fails.
        OriginMisconfigured: more pages or files than any model has.
    """
    return await asyncio.to_thread(_Walker(url, options).walk)


class _Walker:
    def __init__(self, url: str, options: OriginOptions) -> None:
        self._top = url.rstrip("/") + "/"
        self._timeout = options.first_byte_timeout
        proxies = {"http": options.proxy, "https": options.proxy} if options.proxy else {}
        context = None
        if self._top.startswith("https:"):  # reading the system's certificates takes a while
            context = ssl.create_default_context()
            if options.ca_bundle:
                context.load_verify_locations(options.ca_bundle)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context)
        )
        self._opener.addheaders = [("User-Agent", "headrace"), *options.headers]

    def walk(self) -> list[str]:
        page = self._get("")
        if page is None or not _is_index(page):
            return self._by_usual_names()
        files: set[str] = set()
        pending, seen, pages = [("", page)], {""}, 1
        while pending:
            folder, page = pending.pop()
            for path in _children(self._url(folder), page):
                if not path.endswith("/"):
                    files.add(folder + path)
                    continue
                below = folder + path
                if below in seen:
                    continue
                seen.add(below)
                pages += 1
                if pages > MAX_PAGES or len(files) > MAX_FILES:
                    raise OriginMisconfigured(
                        f"{self._top} leads to more than {MAX_PAGES} pages or {MAX_FILES} files: "
                        "name the model's own directory."
                    )
                child = self._get(below)
                if child is None or not _is_index(child):
                    raise OriginMisconfigured(
                        f"{self._url(below)} shows no list of its files, so the model's files below it are "
                        "not known: let the server list that directory, or publish the model."
                    )
                pending.append((below, child))
        return sorted(files)

    def _by_usual_names(self) -> list[str]:
        names = {name for name in _USUAL if self._exists(name)}
        index = self._get(_INDEX)
        if index is not None:
            names |= {_INDEX, *_shards(self._url(_INDEX), index)}
        return sorted(names)

    def _url(self, path: str) -> str:
        return self._top + urllib.parse.quote(path)

    def _get(self, path: str) -> bytes | None:
        """The body at `path`; None if there is none."""
        url = self._url(path)
        try:
            with self._opener.open(url, timeout=self._timeout) as response:
                data: bytes = response.read(MAX_PAGE_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                # Servers answer 403 for a directory that they do not list: its files may still be served.
                if error.code in (403, 404, 410) and (path == "" or error.code != 403):
                    return None
                raise translate.foreign(error, url) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise translate.foreign(_cause(error), url) from error
        if len(data) > MAX_PAGE_BYTES:
            if path == "":
                return None  # not a page of links: what the URL names is a file
            raise OriginError(
                f"{url} is larger than the {MAX_PAGE_BYTES} bytes that a list of files may have."
            )
        return data

    def _exists(self, path: str) -> bool:
        request = urllib.request.Request(self._url(path), method="HEAD")
        try:
            with self._opener.open(request, timeout=self._timeout):
                return True
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (403, 404, 410):
                    return False
                raise translate.foreign(error, request.full_url) from error
        except (OSError, http.client.HTTPException) as error:
            raise translate.foreign(_cause(error), request.full_url) from error


def _cause(error: Exception) -> BaseException:
    """What urllib wrapped: the cause says more."""
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, BaseException) else error


class _Links(HTMLParser):
    """Collects the targets of a page's links, and its title."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]


def _is_index(page: bytes) -> bool:
    """Whether this is a server's list of a directory rather than any other page."""
    head = page[:4096].lower()
    return b"<" in head and (b"index of" in head or b"directory listing" in head)


def _children(url: str, page: bytes) -> list[str]:
    """The direct children that `page` links to, decoded; directories end in a slash."""
    parser = _Links()
    parser.feed(page.decode("utf-8", "replace"))
    parser.close()
    base = urllib.parse.urlsplit(url)
    found = []
    for link in parser.links:
        # Links with a query sort the page; a link with a scheme or host of its own must be this server's.
        try:
            target = urllib.parse.urlsplit(urllib.parse.urljoin(url, link))
        except ValueError:
            continue
        if target.query or target[:2] != base[:2] or not target.path.startswith(base.path):
            continue
        name = target.path[len(base.path) :]
        if name.strip("/") and "/" not in name.rstrip("/"):
            found.append(urllib.parse.unquote(name))
    return [name for name in found if name.rstrip("/") not in (".", "..") and "/" not in name.rstrip("/")]


def _shards(url: str, index: bytes) -> set[str]:
    try:
        files = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OriginMisconfigured(f"{url} is not the index of a sharded checkpoint: {error}.") from error
    if any(not isinstance(name, str) or name.startswith("/") or ".." in name.split("/") for name in files):
        raise OriginMisconfigured(f"{url} names shards outside of its directory.")
    return files
