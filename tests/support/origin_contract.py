"""The contract kit: what every origin promises, whatever is behind it.

Subclass `OriginContract` in a test module, override the fixture `raw` with a `RawOrigin` (a way
to set and look at the origin's content that bypasses the code under test), and say in the class
attributes what this kind of origin can do::

    class TestMyOrigin(OriginContract):
        @pytest.fixture
        def raw(self, my_server) -> RawOrigin:
            return MyRaw(my_server)

Paths given to `raw` are relative to a container of the test's own that is empty at first; a model
lies under its first segment ("llama/config.json").
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from headrace.cache import reference
from headrace.cache.errors import NotFound, OriginChanged, OriginError, UsageError
from headrace.cache.origins import RetryingOrigin, open_origin
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Origin, OriginFile

T = TypeVar("T")
PATIENCE = 60.0  # seconds until a test that hangs fails


class RawOrigin(ABC):
    """An origin's content, set and read by other means than the code under test."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Create or replace the file `path`."""

    @abstractmethod
    def get(self, path: str) -> bytes:
        """The bytes that are there now."""

    @abstractmethod
    def delete(self, path: str) -> None: ...

    @abstractmethod
    def uri(self, path: str) -> str:
        """What a user would type for `path`: a model's directory ("llama") or one file in it."""


def payload(size: int, seed: int = 0) -> bytes:
    """`size` bytes that repeat nowhere and are the same for the same seed."""
    return random.Random(f"{seed}/{size}").randbytes(size)


class OriginContract:
    """What the origin under test can do, as class attributes; then the promises, as tests."""

    writable = True
    """`put` and `put_bytes` work; else they raise UsageError."""
    single_object = True
    """A reference may name one file."""
    keeps_versions = False
    """A replaced or deleted file's old version is still read; else OriginChanged or NotFound."""
    odd_names: tuple[str, ...] = (
        "with space.bin",
        "ünïcødé-模型.bin",
        "plus+plus.bin",
        "per%cent.bin",
        "per%20cent.bin",
        "hash#mark.bin",
        "question?.bin",
        "amp&=.bin",
        "sub dir/ä+b%.bin",
    )
    large = 24 << 20
    """Bytes of the file whose read is cancelled midway and whose upload is in parts."""

    @pytest.fixture
    def raw(self) -> RawOrigin:
        raise NotImplementedError("override the fixture `raw`")

    @pytest.fixture
    def options(self) -> OriginOptions | None:
        """Options to open the origin with; None takes them from the environment."""
        return None

    def run(
        self,
        raw: RawOrigin,
        options: OriginOptions | None,
        path: str,
        body: Callable[[Origin], Awaitable[T]],
    ) -> T:
        """Open the origin at `path`, run `body` with it in a fresh event loop, close it."""

        async def main() -> T:
            origin = open_origin(reference.parse(raw.uri(path)), options)
            try:
                return await asyncio.wait_for(body(origin), PATIENCE)
            finally:
                await origin.close()

        return asyncio.run(main())

    # -- list ----------------------------------------------------------------------------------

    def test_lists_every_file_below_the_prefix_sorted_and_sized(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        sizes = {"config.json": 11, "a/b/c/deep.bin": 5, "a/x.bin": 70_000, "model.safetensors": 0}
        for name, size in sizes.items():
            raw.put(f"llama/{name}", payload(size))
        listing = self.run(raw, options, "llama", lambda o: o.list())
        assert [f.path for f in listing.files] == sorted(sizes)
        assert {f.path: f.size for f in listing.files} == sizes
        assert not listing.single
        assert listing.uri == reference.parse(raw.uri("llama")).uri

    def test_a_trailing_slash_changes_nothing(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/config.json", b"{}")

        async def both() -> tuple[object, object]:
            found = []
            for text in (raw.uri("llama"), raw.uri("llama") + "/"):
                origin = open_origin(reference.parse(text), options)
                try:
                    found.append((await origin.list()).files)
                finally:
                    await origin.close()
            return found[0], found[1]

        plain, slashed = asyncio.run(both())
        assert plain == slashed

    def test_a_sibling_whose_name_starts_alike_is_not_listed(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        raw.put("llama/config.json", b"{}")
        raw.put("llama-2/config.json", b"{}")
        raw.put("llama.json/other.json", b"{}")
        listing = self.run(raw, options, "llama", lambda o: o.list())
        assert [f.path for f in listing.files] == ["config.json"]

    def test_a_reference_to_one_file_lists_that_file(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        if not self.single_object:
            pytest.skip("references of this origin name directories only")
        data = payload(1234)
        raw.put("llama/model.safetensors", data)
        raw.put("llama/model.safetensors.index.json", b"{}")

        async def body(origin: Origin) -> bytes:
            listing = await origin.list()
            assert listing.single
            assert [(f.path, f.size) for f in listing.files] == [("model.safetensors", 1234)]
            return await read(origin, listing.files[0])

        assert self.run(raw, options, "llama/model.safetensors", body) == data

    def test_nothing_under_the_prefix_is_not_found(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        raw.put("llama/config.json", b"{}")
        with pytest.raises(NotFound) as caught:
            self.run(raw, options, "lla", lambda o: o.list())
        assert reference.parse(raw.uri("lla")).uri in str(caught.value)

    def test_odd_names_are_listed_and_read(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        contents = {name: payload(100 + i, i) for i, name in enumerate(self.odd_names)}
        for name, data in contents.items():
            raw.put(f"llama/{name}", data)

        async def body(origin: Origin) -> dict[str, bytes]:
            return {f.path: await read(origin, f) for f in (await origin.list()).files}

        assert self.run(raw, options, "llama", body) == contents

    def test_pins_stay_until_the_file_is_replaced(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        raw.put("llama/a.bin", payload(64, 1))
        first = self.run(raw, options, "llama", lambda o: o.list())
        again = self.run(raw, options, "llama", lambda o: o.list())
        raw.put("llama/a.bin", payload(64, 2))
        replaced = self.run(raw, options, "llama", lambda o: o.list())
        assert first.files == again.files
        assert (replaced.files[0].pin, replaced.revision) != (first.files[0].pin, first.revision)

    # -- stat ----------------------------------------------------------------------------------

    def test_stat_agrees_with_the_listing(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/a.bin", payload(64))
        raw.put("llama/sub/b c.bin", payload(0))

        async def body(origin: Origin) -> None:
            for file in (await origin.list()).files:
                assert await origin.stat(file.path) == file

        self.run(raw, options, "llama", body)

    def test_stat_of_what_is_not_there_is_none(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/sub/a.bin", b"x")

        async def body(origin: Origin) -> list[OriginFile | None]:
            return [await origin.stat(path) for path in ("nothing.bin", "sub", "sub/nothing.bin")]

        assert self.run(raw, options, "llama", body) == [None, None, None]

    # -- read ----------------------------------------------------------------------------------

    def test_reads_the_whole_file_and_any_range(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        data = payload(300_001)
        raw.put("llama/a.bin", data)
        end = len(data)
        ranges = [(0, end), (0, 1), (end - 1, end), (1, 2), (65_535, 65_537), (100_000, 250_001), (7, 7)]

        async def body(origin: Origin) -> list[bytes]:
            file = (await origin.list()).files[0]
            return [await read(origin, file, start, stop) for start, stop in ranges]

        assert self.run(raw, options, "llama", body) == [data[a:b] for a, b in ranges]

    def test_reads_an_empty_file(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/empty.bin", b"")

        async def body(origin: Origin) -> bytes:
            return await read(origin, (await origin.list()).files[0])

        assert self.run(raw, options, "llama", body) == b""

    def test_many_ranges_are_read_at_once(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        data = payload(1 << 20)
        raw.put("llama/a.bin", data)
        step = 1 << 16

        async def body(origin: Origin) -> bytes:
            file = (await origin.list()).files[0]
            starts = range(0, len(data), step)
            return b"".join(await asyncio.gather(*(read(origin, file, s, s + step) for s in starts)))

        assert self.run(raw, options, "llama", body) == data

    def test_a_file_named_by_a_manifest_is_read_without_listing(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        data = payload(5000)
        raw.put("llama/sub/a.bin", data)

        async def body(origin: Origin) -> bytes:
            file = await origin.stat("sub/a.bin")
            assert file is not None
            return await read(origin, file, 10, 4000)

        assert self.run(raw, options, "llama", body) == data[10:4000]

    def test_a_replaced_file_is_never_read_as_the_pinned_one(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        old, new = payload(5000, 1), payload(5000, 2)
        raw.put("llama/a.bin", old)

        async def body(origin: Origin) -> bytes:
            file = (await origin.list()).files[0]
            raw.put("llama/a.bin", new)
            return await read(origin, file, 100, 4000)

        if self.keeps_versions:
            assert self.run(raw, options, "llama", body) == old[100:4000]
        else:
            with pytest.raises(OriginChanged, match=r"a\.bin"):
                self.run(raw, options, "llama", body)

    def test_a_file_that_shrank_is_never_read_as_the_pinned_one(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        old = payload(5000, 1)
        raw.put("llama/a.bin", old)

        async def body(origin: Origin) -> bytes:
            file = (await origin.list()).files[0]
            raw.put("llama/a.bin", payload(10, 2))
            return await read(origin, file, 4000, 5000)

        if self.keeps_versions:
            assert self.run(raw, options, "llama", body) == old[4000:5000]
        else:
            with pytest.raises(OriginChanged, match=r"a\.bin"):
                self.run(raw, options, "llama", body)

    def test_a_deleted_file_ends_in_a_clear_error(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        old = payload(5000, 1)
        raw.put("llama/a.bin", old)
        raw.put("llama/b.bin", b"stays")

        async def body(origin: Origin) -> bytes:
            file = (await origin.list()).files[0]
            raw.delete("llama/a.bin")
            return await read(origin, file, 100, 4000)

        if self.keeps_versions:
            assert self.run(raw, options, "llama", body) == old[100:4000]
        else:
            with pytest.raises((NotFound, OriginChanged), match=r"a\.bin"):
                self.run(raw, options, "llama", body)

    def test_a_cancelled_read_stops_and_the_origin_goes_on(
        self, raw: RawOrigin, options: OriginOptions | None
    ) -> None:
        data = payload(self.large)
        raw.put("llama/a.bin", data)

        async def body(origin: Origin) -> bytes:
            file = (await origin.list()).files[0]
            started = asyncio.Event()

            loop = asyncio.get_running_loop()

            async def reader() -> None:
                while True:  # reads until it is cancelled
                    await _each(origin, file, lambda _: loop.call_soon_threadsafe(started.set))

            task = asyncio.create_task(reader())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await read(origin, file, 5, 5000)

        assert self.run(raw, options, "llama", body) == data[5:5000]

    # -- fetch ---------------------------------------------------------------------------------

    def test_fetches_a_small_file_whole(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/sub/manifest.json", b'{"a": 1}')
        raw.put("llama/empty.json", b"")

        async def body(origin: Origin) -> tuple[bytes | None, bytes | None]:
            return await origin.fetch("sub/manifest.json", 8), await origin.fetch("empty.json", 8)

        assert self.run(raw, options, "llama", body) == (b'{"a": 1}', b"")

    def test_fetch_of_what_is_not_there_is_none(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/a.bin", b"x")
        assert self.run(raw, options, "llama", lambda o: o.fetch("manifest.json", 100)) is None

    def test_fetch_refuses_more_than_the_limit(self, raw: RawOrigin, options: OriginOptions | None) -> None:
        raw.put("llama/manifest.json", payload(1001))
        with pytest.raises(OriginError, match=r"manifest\.json"):
            self.run(raw, options, "llama", lambda o: o.fetch("manifest.json", 1000))

    # -- put -----------------------------------------------------------------------------------

    def test_puts_files_and_bytes(
        self, raw: RawOrigin, options: OriginOptions | None, tmp_path: Path
    ) -> None:
        if not self.writable:
            pytest.skip("this kind of origin cannot be written")
        small, large = payload(1000), payload(self.large)
        (tmp_path / "small").write_bytes(small)
        (tmp_path / "large").write_bytes(large)

        async def body(origin: Origin) -> list[tuple[str, int]]:
            await origin.put("sub/small.bin", str(tmp_path / "small"))
            await origin.put("large.bin", str(tmp_path / "large"))
            await origin.put_bytes("manifest.json", b"first")
            await origin.put_bytes("manifest.json", b"second")
            return [(f.path, f.size) for f in (await origin.list()).files]

        listed = self.run(raw, options, "llama", body)
        assert listed == [("large.bin", self.large), ("manifest.json", 6), ("sub/small.bin", 1000)]
        assert raw.get("llama/sub/small.bin") == small
        assert raw.get("llama/large.bin") == large
        assert raw.get("llama/manifest.json") == b"second"

    def test_what_cannot_be_written_says_so(
        self, raw: RawOrigin, options: OriginOptions | None, tmp_path: Path
    ) -> None:
        if self.writable:
            pytest.skip("this kind of origin can be written")
        raw.put("llama/a.bin", b"x")
        (tmp_path / "b").write_bytes(b"y")
        with pytest.raises(UsageError, match="publish"):
            self.run(raw, options, "llama", lambda o: o.put("b", str(tmp_path / "b")))
        with pytest.raises(UsageError, match="publish"):
            self.run(raw, options, "llama", lambda o: o.put_bytes("b", b"y"))


WAYS = ("pieces", "put")
"""How bytes are read: from `Origin.read`, or by `RetryingOrigin.read_to` as the stager does."""

way = "pieces"
"""The present one; see the fixture `both_ways`."""


async def read(origin: Origin, file: OriginFile, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of `file`, joined."""
    found: list[bytes] = []
    await _each(origin, file, lambda piece: found.append(bytes(memoryview(piece))), start, stop)
    return b"".join(found)


async def _each(
    origin: Origin,
    file: OriginFile,
    put: Callable[[Any], Any],
    start: int = 0,
    stop: int | None = None,
) -> None:
    stop = file.size if stop is None else stop
    if way == "put":
        assert isinstance(origin, RetryingOrigin)
        with ThreadPoolExecutor(2) as pool:
            await origin.read_to(file, start, stop, put, pool)
    else:
        async for piece in origin.read(file, start, stop):
            put(piece)
