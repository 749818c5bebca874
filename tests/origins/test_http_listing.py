"""Finding the files below an http:// URL: index pages of several servers, or a checkpoint's usual names."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http_service import HttpService, Request, Response, serve_bytes
from support.origin_contract import read

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, OriginMisconfigured, OriginUnavailable
from headrace.cache.origins import open_origin
from headrace.cache.origins.http_listing import list_links
from headrace.cache.origins.options import OriginOptions


class Pages(HttpService):
    """Serves `pages` ({path: body or status}); everything else is 404."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[str, bytes | int] = {}

    def answer(self, request: Request) -> Response:
        page = self.pages.get(request.path, 404)
        if isinstance(page, int):
            return Response(page)
        kind = "application/octet-stream" if "." in request.path else "text/html"
        return serve_bytes(request, page, {"Content-Type": kind, "ETag": '"one"'})


@pytest.fixture
def pages() -> Iterator[Pages]:
    with Pages() as service:
        yield service


def found(url: str) -> list[str]:
    return asyncio.run(list_links(url, OriginOptions()))


def index(*links: str) -> bytes:
    items = "".join(f'<a href="{link}">x</a>' for link in links)
    return f"<html><head><title>Index of /</title></head><body>{items}</body></html>".encode()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_pages_of_pythons_server_are_walked(tmp_path: Path) -> None:
    names = ["config.json", "a/b/c.bin", "with space.bin", "ü 模型.bin", "per%20cent.bin", "q?&=+#.bin"]
    for name in names:
        (tmp_path / "llama" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "llama" / name).write_bytes(b"x")
    (tmp_path / "llama-2").mkdir()
    handler = functools.partial(_Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            assert found(f"http://127.0.0.1:{server.server_port}/llama") == sorted(names)
        finally:
            server.shutdown()
            thread.join()


def test_apaches_links_for_sorting_and_the_parent_are_no_files(pages: Pages) -> None:
    pages.pages["/m/"] = index("?C=N;O=D", "?C=M;O=A", "/", "a.bin", "sub/")
    pages.pages["/m/sub/"] = index("?C=N;O=D", "/m/", "b.bin")
    assert found(f"{pages.url}/m/") == ["a.bin", "sub/b.bin"]


def test_links_to_other_hosts_and_outside_the_prefix_are_left_alone(pages: Pages) -> None:
    pages.pages["/m/"] = index(
        "https://example.com/m/evil.bin", "//example.com/m/evil.bin", "../other/x.bin", "/m-2/x.bin",
        "%2e%2e/x.bin", "..%2Fx.bin", "deep/er/x.bin", "javascript:void(0)", "http://[", "/m/absolute.bin",
        f"{pages.url}/m/full.bin",
    )  # fmt: skip
    assert found(f"{pages.url}/m") == ["absolute.bin", "full.bin"]
    assert [r.path for r in pages.requests] == ["/m/"]


def test_pages_that_lead_back_to_each_other_end(pages: Pages) -> None:
    pages.pages["/m/"] = index("a/", "./a/", "a.bin")
    pages.pages["/m/a/"] = index("/m/", "b.bin")
    assert found(f"{pages.url}/m") == ["a.bin", "a/b.bin"]


def test_endless_pages_are_refused(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.cache.origins.http_listing.MAX_PAGES", 20)
    for depth in range(40):
        pages.pages["/m/" + "d/" * depth] = index("d/")
    with pytest.raises(OriginMisconfigured, match="20 pages"):
        found(f"{pages.url}/m")


def test_a_directory_that_is_not_shown_below_one_that_is_ends_in_an_error(pages: Pages) -> None:
    pages.pages["/m/"] = index("a.bin", "hidden/")
    pages.pages["/m/hidden/"] = b"<html>Welcome</html>"
    with pytest.raises(OriginMisconfigured, match="/m/hidden/"):
        found(f"{pages.url}/m")
    pages.pages["/m/hidden/"] = 403
    with pytest.raises(AccessDenied, match="/m/hidden/"):
        found(f"{pages.url}/m")


@pytest.mark.parametrize("top", [404, 403, b"<html>Welcome</html>"])
def test_without_pages_the_usual_files_and_the_shards_of_the_index_are_found(
    pages: Pages, top: bytes | int
) -> None:
    shards = {"x": "model-1.safetensors", "y": "sub/model-2.safetensors", "z": "missing.safetensors"}
    pages.pages = {
        "/m/": top,
        "/m/config.json": b"{}",
        "/m/tokenizer.json": b"{}",
        "/m/model.safetensors.index.json": json.dumps({"weight_map": shards}).encode(),
        "/m/model-1.safetensors": b"1",
        "/m/sub/model-2.safetensors": b"2",
    }
    assert found(f"{pages.url}/m") == [
        "config.json",
        "missing.safetensors",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "sub/model-2.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b'{"weight_map": {"x": "../y"}}', b'{"weight_map": {"x": 1}}']
)
def test_an_index_that_is_none_is_refused(pages: Pages, content: bytes) -> None:
    pages.pages["/m/model.safetensors.index.json"] = content
    with pytest.raises(OriginMisconfigured, match=r"index\.json"):
        found(f"{pages.url}/m")


def test_nothing_there_is_an_empty_list(pages: Pages) -> None:
    assert found(f"{pages.url}/m") == []


def test_a_server_that_fails_is_unavailable(pages: Pages) -> None:
    pages.pages["/m/"] = 503
    with pytest.raises(OriginUnavailable, match="503"):
        found(f"{pages.url}/m")


def test_a_server_that_is_gone_is_unavailable(pages: Pages) -> None:
    gone = Pages()
    with gone:
        url = gone.url
    with pytest.raises(OriginUnavailable, match="refused"):
        found(f"{url}/m")


def test_a_checkpoint_on_a_server_without_pages_is_listed_with_sizes_and_read(pages: Pages) -> None:
    index_json = json.dumps({"weight_map": {"x": "model-1.safetensors", "y": "missing.safetensors"}}).encode()
    pages.pages = {
        "/m/config.json": b"{}",
        "/m/model.safetensors.index.json": index_json,
        "/m/model-1.safetensors": b"12345",
    }

    async def main() -> dict[str, bytes]:
        origin = open_origin(reference.parse(f"{pages.url}/m"))
        try:
            return {f.path: await read(origin, f) for f in (await origin.list()).files}
        finally:
            await origin.close()

    assert asyncio.run(main()) == {
        "config.json": b"{}",
        "model-1.safetensors": b"12345",
        "model.safetensors.index.json": index_json,
    }
