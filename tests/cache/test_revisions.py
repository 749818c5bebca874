"""A new revision moves what changed; the same bytes under another name move not at all.

The models here have a transformer's tensors at a sixteenth of their usual sizes, and so have the chunks:
256 KiB and 1 MiB stand for 4 and 16 MiB. `headrace bench revisions` does the same at full size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import revisions
from support.faulty_server import FaultyServer
from support.models import CHUNK, below, small_model, stage_small, visible
from support.revisions import Revision, Tensor

from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.origins import OriginOptions
from headrace.cache.publish import publish
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StageReport

BASE = revisions.transformer(hidden=256, inner=1376, vocab=9496, layers=24)
SMALL, LARGE = 256 << 10, 1 << 20
# Bytes fetched for each byte changed, at most.
BOUNDS = {SMALL: 1.15, LARGE: 2.0}
MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASE.write(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def staged(uri: str, root: Path) -> StageReport:
    return stage_small(uri, root, limits=StagerLimits(reserve=0), options=OriginOptions())


def fetched(base: Path, tmp_path: Path, root: Path, chunk: int, revision: Revision) -> StageReport:
    """Stage the base, then a revision of it from a prefix of its own; what the second run says."""
    first = publish(base, str(tmp_path / "one"), chunk=chunk)
    staged(str(tmp_path / "one"), root)
    revision.write(tmp_path / "changed")
    publish(tmp_path / "changed", str(tmp_path / "two"), chunk=chunk, predecessor=first.digest)
    report = staged(str(tmp_path / "two"), root)
    for file in (tmp_path / "changed").iterdir():
        assert Path(report.path, file.name).read_bytes() == file.read_bytes()
    assert report.sources["origin"] + report.sources["local"] == report.bytes
    return report


@pytest.mark.parametrize("chunk", [SMALL, LARGE])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_revision_with_some_new_tensors_moves_little_else(
    base: Path, tmp_path: Path, root: Path, chunk: int, seed: int
) -> None:
    revision, new = revisions.changed(BASE, 0.05, seed)
    report = fetched(base, tmp_path, root, chunk, revision)
    assert new <= report.sources["origin"] <= BOUNDS[chunk] * new


@pytest.mark.parametrize("chunk", [SMALL, LARGE])
def test_a_longer_header_moves_the_header(base: Path, tmp_path: Path, root: Path, chunk: int) -> None:
    revision, new = revisions.longer_header(BASE)
    assert fetched(base, tmp_path, root, chunk, revision).sources["origin"] == new


@pytest.mark.parametrize("chunk", [SMALL, LARGE])
def test_an_added_tensor_moves_itself_and_the_header(
    base: Path, tmp_path: Path, root: Path, chunk: int
) -> None:
    revision, new = revisions.added(BASE, Tensor("model.layers.11.mlp.extra_proj.weight", (1376, 256)))
    report = fetched(base, tmp_path, root, chunk, revision)
    assert new <= report.sources["origin"] <= BOUNDS[chunk] * new


@pytest.mark.parametrize("chunk", [SMALL, LARGE])
def test_new_tensors_a_longer_header_and_an_added_tensor_together(
    base: Path, tmp_path: Path, root: Path, chunk: int
) -> None:
    revision, changed = revisions.changed(BASE, 0.05, seed=7)
    revision, _ = revisions.longer_header(revision)
    revision, added = revisions.added(revision, Tensor("model.layers.3.mlp.extra.weight", (1376, 256)))
    report = fetched(base, tmp_path, root, chunk, revision)
    assert report.sources["origin"] <= BOUNDS[chunk] * (changed + added)


def test_another_division_into_shards_is_reported_and_moves_little(
    base: Path, tmp_path: Path, root: Path
) -> None:
    report = fetched(base, tmp_path, root, LARGE, revisions.resharded(BASE, 4))
    assert any("sharded differently" in note and "(4 files, before 1)" in note for note in report.notes)
    assert report.sources["local"] > 0.9 * BASE.size


def test_the_same_division_into_shards_is_not_reported(base: Path, tmp_path: Path, root: Path) -> None:
    assert fetched(base, tmp_path, root, LARGE, revisions.changed(BASE, 0.05, 1)[0]).notes == ()


def test_without_chunk_digests_a_changed_file_is_fetched_whole_and_that_is_said(
    tmp_path: Path, root: Path
) -> None:
    folder = write(tmp_path / "model", MODEL)
    stage_small(str(folder), root)
    changed = bytearray(MODEL["model-00001-of-00002.safetensors"])
    changed[-1] ^= 1
    (folder / "model-00001-of-00002.safetensors").write_bytes(changed)
    report = stage_small(str(folder), root)
    assert report.sources["origin"] == len(changed)
    assert any("fetched whole" in note and "headrace publish" in note for note in report.notes)


# -- the same bytes


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return folder


def with_manifest(tmp_path: Path, **how: object) -> dict[str, bytes]:
    """The model and the manifest that `publish` makes of it."""
    folder = write(tmp_path / f"published-{len(list(tmp_path.iterdir()))}", MODEL)
    publish(folder, str(folder), **{"chunk": CHUNK, **how})  # type: ignore[arg-type]
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def disk_usage(root: Path) -> int:
    """Bytes of model files in the store, each inode once, as du counts."""
    files = [p for p in root.rglob("*") if p.is_file() and (p.name == "data" or "files" in p.parts)]
    return sum({(s := p.stat()).st_ino: s.st_size for p in files}.values())


class Twin:
    """One server with the model under two prefixes."""

    def __init__(self, server: FaultyServer) -> None:
        self.server = server

    def serve(self, prefix: str, files: dict[str, bytes]) -> str:
        self.server.files = {**self.server.files, **below(prefix, files)}
        return f"{self.server.url}/{prefix}"

    def sent(self, prefix: str) -> int:
        """Bytes of model files that left the server."""
        return sum(self.server.bytes_sent(f"{prefix}/{path}") for path in MODEL)


@pytest.fixture
def twin() -> Iterator[Twin]:
    with FaultyServer({}) as server:
        yield Twin(server)


def test_two_addresses_without_digests_become_one_inode_after_one_more_read(twin: Twin, root: Path) -> None:
    first, second = twin.serve("a", MODEL), twin.serve("b", MODEL)
    one = stage_small(first, root)
    two = stage_small(second, root)
    assert one.snapshot != two.snapshot
    assert (twin.sent("a"), twin.sent("b")) == (SIZE, SIZE)
    assert disk_usage(root) == SIZE
    for path in MODEL:
        assert os.path.samefile(Path(one.path, path), Path(two.path, path))


@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3"])
def test_a_second_address_with_published_digests_reads_nothing(
    twin: Twin, tmp_path: Path, root: Path, algorithm: str
) -> None:
    files = with_manifest(tmp_path, algorithm=algorithm)
    one = stage_small(twin.serve("a", files), root)
    two = stage_small(twin.serve("b", files), root)
    assert one.snapshot == two.snapshot
    assert (twin.sent("a"), twin.sent("b")) == (SIZE, 0)
    assert disk_usage(root) == SIZE


@pytest.mark.parametrize("chunk", [CHUNK, 4 * CHUNK])
@pytest.mark.parametrize("algorithm", ["xxh3-128", "blake3"])
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_a_listing_then_a_published_manifest_reads_nothing(
    twin: Twin, tmp_path: Path, root: Path, chunk: int, algorithm: str, prefix: str
) -> None:
    """At the same address or another, with the same chunks or others."""
    stage_small(twin.serve("a", MODEL), root)
    twin.server.clear()
    files = with_manifest(tmp_path, chunk=chunk, algorithm=algorithm)
    address = twin.serve(prefix, files)
    report = stage_small(address, root, require="published")
    assert twin.sent("a") == twin.sent("b") == 0
    assert report.sources == {"origin": 0, "peer": 0, "local": SIZE}
    assert disk_usage(root) == SIZE
    assert visible(root) == MODEL


@pytest.mark.parametrize("how", [{"chunk": 4 * CHUNK}, {"algorithm": "blake3"}])
def test_the_same_files_published_with_other_chunks_read_nothing(
    twin: Twin, tmp_path: Path, root: Path, how: dict[str, object]
) -> None:
    """Both are one snapshot, as its identity is the files and not how they are cut."""
    one = stage_small(twin.serve("a", with_manifest(tmp_path)), root)
    twin.server.clear()
    two = stage_small(twin.serve("b", with_manifest(tmp_path, **how)), root)
    assert one.snapshot == two.snapshot
    assert twin.sent("b") == 0
    assert disk_usage(root) == SIZE
    assert stage_small(twin.server.url + "/a", root).sources["origin"] == 0
    assert twin.sent("a") == 0


def test_an_altered_byte_under_equal_names_and_sizes_is_not_taken_for_the_same(
    twin: Twin, tmp_path: Path, root: Path
) -> None:
    stage_small(twin.serve("a", MODEL), root)
    name = "model-00002-of-00002.safetensors"
    altered = bytearray(MODEL[name])
    altered[-1] ^= 1
    stage_small(twin.serve("b", {**MODEL, name: bytes(altered)}), root)
    assert disk_usage(root) == SIZE + len(altered)


def test_a_revision_from_a_server_sends_what_the_report_says(
    twin: Twin, base: Path, tmp_path: Path, root: Path
) -> None:
    revision, new = revisions.changed(BASE, 0.05, seed=3)
    revision.write(tmp_path / "changed")
    for folder, prefix in ((base, "one"), (tmp_path / "changed", "two")):
        publish(folder, str(tmp_path / prefix), chunk=LARGE)
        twin.serve(prefix, {p.name: p.read_bytes() for p in (tmp_path / prefix).iterdir()})
    staged(f"{twin.server.url}/one", root)
    report = staged(f"{twin.server.url}/two", root)
    assert twin.server.bytes_sent("two/model.safetensors") == report.sources["origin"] <= 2 * new
    assert twin.server.bytes_sent(f"two/{PUBLISHED_NAME}") < 100_000
