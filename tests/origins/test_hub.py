"""The Hugging Face hub, against a fake that answers what huggingface_hub asks."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from support.fake_hub import FakeHub
from support.origin_contract import OriginContract, RawOrigin, payload, read

from headrace.cache import reference
from headrace.cache.errors import AccessDenied, HeadraceError, NotFound, OriginUnavailable, UsageError
from headrace.cache.origins import open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, Origin, Pin

T = TypeVar("T")
NAME = "models/org/name"


class RawHub(RawOrigin):
    """The paths of a repository; the reference's first segment is a directory in it."""

    def __init__(self, fake: FakeHub, name: str, prefix: str) -> None:
        self._repository = fake.repository(name)
        self._repository.commit({})
        self._prefix = prefix

    def put(self, path: str, data: bytes) -> None:
        self._repository.commit({**self._files(), path: data})

    def get(self, path: str) -> bytes:
        return self._files()[path]

    def delete(self, path: str) -> None:
        self._repository.commit({k: v for k, v in self._files().items() if k != path})

    def uri(self, path: str) -> str:
        return f"hf://{self._prefix}/{path}"

    def _files(self) -> dict[str, bytes]:
        return self._repository.commits[self._repository.refs["main"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("HF_TOKEN", "hf_user")
        yield fake


class TestModel(OriginContract):
    writable = False
    keeps_versions = True

    @pytest.fixture
    def raw(self, hub: FakeHub) -> RawOrigin:
        return RawHub(hub, NAME, "org/name")


class TestDataset(OriginContract):
    writable = False
    keeps_versions = True

    @pytest.fixture
    def raw(self, hub: FakeHub) -> RawOrigin:
        return RawHub(hub, "datasets/org/name", "datasets/org/name")


def run(text: str, body: Callable[[Origin], Awaitable[T]], **changes: object) -> T:
    async def main() -> T:
        options = dataclasses.replace(OriginOptions.from_env("hf"), **changes)  # type: ignore[arg-type]
        origin = open_origin(reference.parse(text), options)
        try:
            return await body(origin)
        finally:
            await origin.close()

    return asyncio.run(main())


def listed(text: str) -> Listing:
    return run(text, lambda origin: origin.list())


async def everything(origin: Origin) -> dict[str, bytes]:
    return {f.path: await read(origin, f) for f in (await origin.list()).files}


def test_large_files_carry_the_digest_that_the_hub_publishes(hub: FakeHub) -> None:
    weights = payload(5000)
    commit = hub.repository(NAME).commit({"config.json": b"{}", "model.safetensors": weights})
    listing = listed("hf://org/name")
    assert listing.revision == commit
    assert [(f.path, f.digest, f.pin) for f in listing.files] == [
        ("config.json", None, Pin("commit", commit)),
        ("model.safetensors", f"sha256:{hashlib.sha256(weights).hexdigest()}", Pin("commit", commit)),
    ]


def test_branches_tags_and_commits_are_revisions(hub: FakeHub) -> None:
    repository = hub.repository(NAME)
    first = repository.commit({"a": b"1"})
    repository.commit({"a": b"2"}, ref="v2.0")
    repository.commit({"a": b"3"}, ref="refs/pr/1")
    repository.commit({"a": b"4"})
    for revision, data in ((first, b"1"), ("v2.0", b"2"), ("refs/pr/1", b"3"), ("main", b"4")):
        assert run(f"hf://org/name@{revision}", everything) == {"a": data}
    assert run("hf://org/name", everything) == {"a": b"4"}


def test_a_branch_that_moves_on_midway_changes_nothing(hub: FakeHub) -> None:
    repository = hub.repository(NAME)
    repository.commit({"a.bin": payload(3000, 1), "b.bin": payload(3000, 1)})

    async def body(origin: Origin) -> list[bytes]:
        files = (await origin.list()).files
        begun = await read(origin, files[0])
        repository.commit({"a.bin": payload(3000, 2), "b.bin": payload(3000, 2)})
        return [begun, await read(origin, files[1])]

    assert run("hf://org/name", body) == [payload(3000, 1)] * 2


def test_where_a_files_bytes_are_is_asked_once(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"a.bin": payload(64_000)})

    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        parts = await asyncio.gather(*(read(origin, file, s, s + 1000) for s in range(0, 64_000, 1000)))
        return b"".join(parts)

    assert run("hf://org/name", body) == payload(64_000)
    assert (hub.count("HEAD", "/resolve/"), hub.count("GET", "/resolve/")) == (1, 0)
    assert hub.count("GET", "/cdn/") == 64


def test_a_signed_url_that_expires_midway_is_renewed(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"a.bin": payload(10_000)})
    hub.signature_uses = 3

    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        return b"".join([await read(origin, file, s, s + 1000) for s in range(0, 10_000, 1000)])

    assert run("hf://org/name", body) == payload(10_000)
    assert hub.count("HEAD", "/resolve/") == 4


def test_a_signed_url_is_never_shown(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"a.bin": payload(10_000)})
    hub.signature_uses = 0

    async def body(origin: Origin) -> bytes:
        return await read(origin, (await origin.list()).files[0])

    with pytest.raises(AccessDenied, match=r"a\.bin") as caught:
        run("hf://org/name", body)
    assert "Signature" not in repr(caught.value)
    assert caught.value.__suppress_context__


def test_the_token_goes_to_the_hub_alone(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"config.json": b"{}", "a.bin": payload(5000)})
    run("hf://org/name", everything)
    sent = {r.path.split("/")[1]: r.headers.get("authorization") for r in hub.requests}
    assert sent == {"api": "Bearer hf_user", "org": "Bearer hf_user", "cdn": None}


def test_no_token_is_sent_when_anonymous(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"config.json": b"{}"})
    run("hf://org/name", everything, anonymous=True)
    assert {r.headers.get("authorization") for r in hub.requests} == {None}


def test_a_token_set_midway_is_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repository(NAME)
    repository.commit({"a.bin": payload(5000)})
    repository.private = True
    hub.readers = {"hf_owner"}

    async def body(origin: Origin) -> bytes:
        with pytest.raises(NotFound, match="HF_TOKEN"):
            await origin.list()
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        return await read(origin, (await origin.list()).files[0])

    assert run("hf://org/name", body) == payload(5000)


def test_a_token_renewed_midway_is_used_for_small_files_too(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub.repository(NAME)
    repository.commit({"config.json": b'{"a": 1}'})
    repository.private = True
    hub.readers = {"hf_user"}

    async def body(origin: Origin) -> bytes:
        file = (await origin.list()).files[0]
        begun = await read(origin, file, 0, 4)
        hub.readers = {"hf_second"}
        monkeypatch.setenv("HF_TOKEN", "hf_second")
        return begun + await read(origin, file, 4, 8)

    assert run("hf://org/name", body) == b'{"a": 1}'


def test_a_gated_repository_says_where_to_ask(hub: FakeHub) -> None:
    repository = hub.repository(NAME)
    repository.commit({"a.bin": payload(5000)})
    repository.gated = True

    async def body(origin: Origin) -> bytes:
        return await read(origin, (await origin.list()).files[0])

    with pytest.raises(AccessDenied, match=f"gated: ask for access at {hub.url}/org/name"):
        run("hf://org/name", body)
    hub.readers = {"hf_user"}
    assert run("hf://org/name", body) == payload(5000)


def test_what_is_private_or_missing_says_so_without_a_token(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        listed("hf://org/name")


def test_a_missing_repository_revision_or_directory_is_not_found(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"a.bin": b"x"})
    with pytest.raises(NotFound, match="hf://org/other"):
        listed("hf://org/other")
    with pytest.raises(NotFound, match="'v9'"):
        listed("hf://org/name@v9")
    with pytest.raises(NotFound, match="hf://org/name/sub"):
        listed("hf://org/name/sub")


@pytest.mark.parametrize("text", ["hf://datasets", "hf://org/../name", "hf://bad name/x"])
def test_what_cannot_be_a_repository_is_refused(hub: FakeHub, text: str) -> None:
    with pytest.raises(HeadraceError) as caught:
        listed(text)
    assert isinstance(caught.value, UsageError | NotFound)


def test_offline_mode_asks_nothing_and_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HeadraceError, match="HF_HUB_OFFLINE"):
        listed("hf://org/name")
    assert hub.requests == []


def test_a_hub_that_nobody_serves_is_unavailable(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = FakeHub()
    with gone:
        url = gone.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(OriginUnavailable, match="hf://org/name"):
        run("hf://org/name", lambda origin: origin.list(), attempts=2, backoff_base=0.0)


def test_one_file_is_read_without_listing_first(hub: FakeHub) -> None:
    hub.repository(NAME).commit({"model.safetensors": payload(3000), "sub/x.json": b"{}"})

    async def body(origin: Origin) -> bytes:
        file = await origin.stat("model.safetensors")
        assert file is not None
        assert await origin.fetch("manifest.json", 100) is None
        return await read(origin, file)

    assert run("hf://org/name/model.safetensors", body) == payload(3000)
