"""The fsspec scheme `headrace::`: fsspec's own tests for reading, and reads that stage just as far as they reach."""

from __future__ import annotations

import asyncio
import io
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faulty_server import Fault, FaultyServer
from support.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedFS

pytest.importorskip("fsspec", reason="fsspec is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

import fsspec
import s3fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests

from headrace.cache import ondemand, stage
from headrace.cache.errors import Held, UsageError
from headrace.cache.evict import remove
from headrace.cache.filesystem import HeadraceFileSystem
from headrace.cache.grid import DEFAULT_CHUNK
from headrace.cache.store import Store

MODEL = {
    "config.json": b'{"model_type": "test"}',
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "tokenizer/vocab.txt": b"one\ntwo\nthree\n",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HEADRACE_ROOT", str(tmp_path / "store"))
    yield
    for instance in list(HeadraceFileSystem._cache.values()):
        instance.invalidate_cache()
    HeadraceFileSystem.clear_instance_cache()


def written_once(scenario: str, folder: str) -> Any:
    """A fixture that has fsspec write one of its scenarios, once for all tests of a class: they only read it."""

    def write(cls: Any, origin: Any, fs_path: str) -> Any:
        return getattr(cls(), scenario)(origin, joined, f"{fs_path}/{folder}")

    of_class: Any = classmethod(write)
    return pytest.fixture(scope="class")(of_class)


class ReadOnlyFixtures(AbstractFixtures, AbstractGetTests):  # type: ignore[misc]  # fsspec has no types
    """fsspec's fixtures, except that what is read is written at the origin."""

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return joined

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False

    fs_bulk_operations_scenario_0 = written_once("_bulk_operations_scenario_0", "bulk")
    fs_glob_edge_cases_files = written_once("_glob_edge_cases_files", "glob")
    fs_dir_and_file_with_same_name_prefix = written_once("_dir_and_file_with_same_name_prefix", "prefix")
    fs_10_files_with_hashed_names = written_once("_10_files_with_hashed_names", "ten")

    def test_get_directory_recursive(
        self,
        fs: Any,
        origin: Any,
        fs_join: Any,
        fs_path: str,
        local_fs: Any,
        local_join: Any,
        local_target: str,
    ) -> None:
        """fsspec's test creates its files through the filesystem under test; otherwise as there."""

        class Creating(type(fs)):  # type: ignore[misc]
            cachable = False

            def mkdir(self, path: str, *_: Any, **__: Any) -> None:
                origin.makedirs(path, exist_ok=True)

            def touch(self, path: str, *_: Any, **__: Any) -> None:
                origin.touch(path)

        creating = Creating(target_protocol=fs._target)
        super().test_get_directory_recursive(creating, fs_join, fs_path, local_fs, local_join, local_target)
        creating.invalidate_cache()


class TestGetFromFiles(ReadOnlyFixtures):
    @pytest.fixture(scope="class")
    @classmethod
    def origin(cls) -> Any:
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs(self) -> Any:
        return fsspec.filesystem("headrace", target_protocol="file")

    @pytest.fixture(scope="class")
    @classmethod
    def fs_path(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(tmp_path_factory.mktemp("origin"))


@pytest.mark.service
class TestGetFromS3(ReadOnlyFixtures):
    @pytest.fixture(scope="class")
    @classmethod
    def fs_path(cls, s3: Any) -> str:
        s3.mkdir("abstract")
        return "abstract/models"

    @pytest.fixture(scope="class")
    @classmethod
    def origin(cls, s3: Any) -> Any:
        return s3

    @pytest.fixture
    def fs(self, s3_environment: None) -> Any:
        return fsspec.filesystem("headrace", target_protocol="s3")


def joined(*parts: str) -> str:
    return "/".join(parts)


@pytest.fixture(scope="module")
def s3(seaweedfs: SeaweedFS) -> Any:
    """The server as s3fs sees it, for writing."""
    return s3fs.S3FileSystem(
        endpoint_url=seaweedfs.url, key=ACCESS_KEY, secret=SECRET_KEY, skip_instance_cache=True,
        use_listings_cache=False,
    )  # fmt: skip


@pytest.fixture
def s3_environment(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environ.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for path, data in MODEL.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.mark.service
def test_the_scheme_reads_from_s3_and_without_it_once_staged(s3: Any, s3_environment: None) -> None:
    bucket = "once-staged"
    s3.mkdir(bucket)
    for path, data in MODEL.items():
        s3.pipe(f"{bucket}/m/{path}", data)
    with fsspec.open(f"headrace::s3://{bucket}/m/config.json") as file:
        assert file.read() == MODEL["config.json"]
    fs, path = fsspec.url_to_fs(f"headrace::s3://{bucket}/m")
    assert path == f"{bucket}/m"
    assert fs.find(path) == sorted(f"{bucket}/m/{name}" for name in MODEL)
    assert {name: fs.cat(f"{path}/{name}") for name in MODEL} == MODEL
    stage(f"s3://{bucket}/m")
    s3.rm(f"{bucket}/m", recursive=True)
    assert fs.cat(path, recursive=True, on_error="omit") == {
        f"{path}/{name}": data for name, data in MODEL.items()
    }


def test_listings_and_parts(model: Path) -> None:
    fs, path = fsspec.url_to_fs(f"headrace::file://{model}")
    assert fs.ls(path, detail=False) == [
        f"{path}/{n}" for n in ("config.json", "model.safetensors", "tokenizer")
    ]
    assert [entry["type"] for entry in fs.ls(path)] == ["file", "file", "directory"]
    vocabulary = f"{path}/tokenizer/vocab.txt"
    assert fs.ls(vocabulary) == [fs.info(vocabulary)]
    assert fs.info(vocabulary)["size"] == fs.size(vocabulary) == 14
    assert fs.isdir(f"{path}/tokenizer") and fs.isfile(vocabulary)
    assert fs.exists(vocabulary) and not fs.exists(f"{path}/tokenizer/vocab")
    assert [*fs.walk(path)][1] == (f"{path}/tokenizer", [], ["vocab.txt"])
    assert fs.glob(f"{path}/**/*.txt") == [vocabulary]
    assert fs.cat_file(vocabulary, 4, 7) == b"two"
    assert fs.cat_file(vocabulary, -6) == b"three\n"
    assert fs.cat_file(vocabulary, 8, 1000) == b"three\n"
    assert fs.head(vocabulary, 3) == b"one" and fs.tail(vocabulary, 3) == b"ee\n"
    assert fs.read_text(vocabulary).splitlines() == ["one", "two", "three"]
    ranges = fs.cat_ranges([vocabulary, f"{path}/none", vocabulary], [0, 0, 4], [3, 1, None])
    assert ranges[0] == b"one" and ranges[2] == b"two\nthree\n"
    assert isinstance(ranges[1], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([f"{path}/none"], 0, 1, on_error="raise")
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{path}/none")
    with pytest.raises(IsADirectoryError):
        fs.cat_file(path)
    assert fs.unstrip_protocol(vocabulary) == f"headrace::file://{vocabulary}"


def test_an_opened_file_is_a_file(model: Path) -> None:
    with fsspec.open(f"headrace::file://{model}/tokenizer/vocab.txt") as file:
        assert file.size == 14
        assert file.readline() == b"one\n" and file.seek(-6, io.SEEK_END) == 8
        assert file.read(3) == b"thr" and file.tell() == 11
        again = pickle.loads(pickle.dumps(file))
        assert again.read() == b"ee\n"
        again.close()
    with fsspec.open(f"headrace::file://{model}/tokenizer/vocab.txt", "rt") as text:
        assert text.read() == "one\ntwo\nthree\n"
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_paths_can_be_uris_when_no_target_is_named(model: Path) -> None:
    fs = fsspec.filesystem("headrace")
    assert fs.cat_file(f"file://{model}/config.json") == MODEL["config.json"]
    assert fs.cat_file(f"headrace://file://{model}/config.json", 1, 3) == MODEL["config.json"][1:3]


def test_it_works_where_an_event_loop_runs(model: Path) -> None:
    async def read() -> bytes:
        fs, path = fsspec.url_to_fs(f"headrace::file://{model}/config.json")
        return bytes(fs.cat_file(path))

    assert asyncio.run(read()) == MODEL["config.json"]


def test_get_copies_a_whole_model(model: Path, tmp_path: Path) -> None:
    fs, path = fsspec.url_to_fs(f"headrace::file://{model}")
    fs.get(path, str(tmp_path / "copy"), recursive=True)
    copied = {str(p.relative_to(tmp_path / "copy")): p.read_bytes() for p in (tmp_path / "copy").rglob("*.*")}
    assert copied == MODEL


WRITES: dict[str, Callable[[Any, str], Any]] = {
    "open": lambda fs, path: fs.open(path, "wb"),
    "append": lambda fs, path: fs.open(path, "ab"),
    "pipe": lambda fs, path: fs.pipe(path, b"x"),
    "pipe_file": lambda fs, path: fs.pipe_file(path, b"x"),
    "write_text": lambda fs, path: fs.write_text(path, "x"),
    "touch": lambda fs, path: fs.touch(path),
    "put": lambda fs, path: fs.put(__file__, path),
    "mkdir": lambda fs, path: fs.mkdir(path + "/new"),
    "makedirs": lambda fs, path: fs.makedirs(path + "/new/er"),
    "rm": lambda fs, path: fs.rm(path, recursive=True),
    "rm_file": lambda fs, path: fs.rm_file(path),
    "delete": lambda fs, path: fs.delete(path),
    "rmdir": lambda fs, path: fs.rmdir(path),
    "copy": lambda fs, path: fs.copy(path, path + "2"),
    "cp": lambda fs, path: fs.cp(path, path + "2"),
    "mv": lambda fs, path: fs.mv(path, path + "2"),
    "rename": lambda fs, path: fs.rename(path, path + "2"),
    "upload": lambda fs, path: fs.upload(__file__, path),
}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_can_be_written(model: Path, name: str) -> None:
    fs, path = fsspec.url_to_fs(f"headrace::file://{model}/config.json")
    with pytest.raises(
        OSError, match=r"headrace:: is read-only: write .* at its origin, or use `headrace publish`"
    ):
        WRITES[name](fs, path)
    assert (model / "config.json").read_bytes() == MODEL["config.json"]
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "model.safetensors", "tokenizer"]


# -- what is staged, and when ---------------------------------------------------------------------------------


def test_the_revision_that_was_listed_is_the_one_that_is_read(model: Path) -> None:
    fs, path = fsspec.url_to_fs(f"headrace::file://{model}")
    assert fs.cat_file(f"{path}/config.json") == MODEL["config.json"]
    stage(f"file://{model}")
    (model / "config.json").write_bytes(b"something else")
    assert fs.cat_file(f"{path}/config.json") == MODEL["config.json"]
    fs.invalidate_cache()
    assert fs.cat_file(f"{path}/config.json") == b"something else"


def test_what_nobody_reads_can_be_evicted_and_is_had_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ondemand, "LINGER", 0.0)

    def evict() -> None:
        assert ended_within_a_minute("headrace-staging")
        with Store.open(tmp_path / "store") as store:
            remove(store, store.domain(), store.domain().find(f"file://{model}"))

    fs, path = fsspec.url_to_fs(f"headrace::file://{model}")
    opened = fs.open(f"{path}/tokenizer/vocab.txt")
    stage(f"file://{model}")
    with pytest.raises(Held):
        evict()
    assert opened.read() == MODEL["tokenizer/vocab.txt"]
    opened.close()
    evict()
    assert fs.cat_file(f"{path}/config.json") == MODEL["config.json"]
    evict()
    (model / "config.json").write_bytes(b"new")
    assert fs.cat_file(f"{path}/config.json") == b"new"


def test_what_headrace_staged_serves_files_by_their_own_path(model: Path) -> None:
    report = stage(f"file://{model}")
    fs, path = fsspec.url_to_fs(f"headrace::file://{model}/tokenizer/vocab.txt")
    assert fs.info(path)["snapshot"] == report.snapshot
    assert fs.cat_file(path) == MODEL["tokenizer/vocab.txt"]


def test_the_model_can_be_named(model: Path) -> None:
    url = f"headrace::file://{model}/tokenizer/vocab.txt"
    with fsspec.open(url, headrace={"model": str(model)}) as file:
        assert file.read() == MODEL["tokenizer/vocab.txt"]
        assert file.fs.isfile(f"{model}/config.json")
        with pytest.raises(FileNotFoundError, match="is not part of"):
            file.fs.info(str(model.parent))


def test_options_that_mean_nothing_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="storage option secret means nothing"):
        fsspec.url_to_fs("headrace::s3://bucket/model", s3={"anon": False, "secret": "x"})


def test_a_read_waits_for_its_chunk_and_no_other_and_staging_ends_with_the_last_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ondemand, "LINGER", 0.0)
    size = 4 * DEFAULT_CHUNK
    data = bytes(size - 4) + b"last"
    stalls = [
        Fault("stall", path="*weights.bin", header=("Range", f"bytes={start}-*"), after=-1, seconds=600)
        for start in range(0, size - DEFAULT_CHUNK, 1 << 20)
    ]
    with FaultyServer({"m/weights.bin": data, "m/config.json": b"{}"}, faults=stalls) as server:
        fs, path = fsspec.url_to_fs(f"headrace::{server.url}/m/weights.bin")
        with fs.open(path) as file:
            file.seek(-4, io.SEEK_END)
            assert file.read() == b"last"
            assert file.seek(3 * DEFAULT_CHUNK) and file.read(2) == b"\0\0"
        assert ended_within_a_minute("headrace-staging")
        assert server.bytes_sent("*weights.bin") <= size // 2
        server.faults = ()
        assert fs.cat_file(path, 0, 2) == b"\0\0"
        assert ended_within_a_minute("headrace-staging")
        assert fs.cat_file(path, -4) == b"last"


def ended_within_a_minute(name: str) -> bool:
    for _ in range(600):
        if not any(thread.name == name for thread in threading.enumerate()):
            return True
        time.sleep(0.1)
    return False


def test_what_the_origin_refuses_is_said_as_filesystems_say_it(tmp_path: Path) -> None:
    denied = Fault("status", path="*", status=403)
    with FaultyServer({"m/weights.bin": b"x"}, faults=[denied]) as server:
        fs, path = fsspec.url_to_fs(f"headrace::{server.url}/m/weights.bin")
        with pytest.raises(PermissionError, match=r"weights\.bin"):
            fs.cat_file(path)
        server.faults = ()
        assert fs.cat_file(path) == b"x"
        with pytest.raises(FileNotFoundError):
            fs.cat_file(path + "2")
