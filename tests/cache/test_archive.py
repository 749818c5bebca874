"""Archives are staged, unpacked within limits into a snapshot of their own, and never believed."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.models import CHUNK, below, small_model, stage_small, visible

from headrace.cache import archive, disk
from headrace.cache.archive import Derived
from headrace.cache.errors import (
    ArchiveError,
    CheckpointError,
    HeadraceError,
    NoSpace,
    SignatureError,
    UnsafePath,
)
from headrace.cache.publish import publish
from headrace.cache.reading import StoredSnapshot
from headrace.cache.snapshot import Selection
from headrace.cache.staging import StageReport, open_for_loading
from headrace.cache.store import Store
from headrace.cache.tarball import ArchiveLimits
from headrace.loader.reference import open_source

MODEL = small_model()


def packed(files: Mapping[str, bytes], mode: str = "w", prefix: str = "", **how: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **how) as tar:  # type: ignore[call-overload]
        for path, data in files.items():
            member = tarfile.TarInfo(f"{prefix}{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def with_member(change: Callable[[tarfile.TarInfo], None], data: bytes = b"") -> bytes:
    """An archive with one good file and one that `change` makes of an empty header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        good = tarfile.TarInfo("config.json")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"{}"))
        member = tarfile.TarInfo("member")
        member.size = len(data)
        change(member)
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def derived(root: Path, report: StageReport) -> dict[str, bytes]:
    base = Path(report.path)
    assert root in base.parents
    return {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}


def left_behind(root: Path) -> list[Path]:
    return [p for p in (root / "tmp").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("model.tar", "w"), ("model.tar.gz", "w:gz"), ("model.tgz", "w:gz"), ("odd.tar", "w:gz")],
)
@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive_is_staged_as_its_members(
    tmp_path: Path, root: Path, name: str, mode: str, prefix: str
) -> None:
    (tmp_path / name).write_bytes(packed(MODEL, mode, prefix))
    report = stage_small(str(tmp_path / name), root)
    assert derived(root, report) == MODEL
    assert report.files == len(MODEL)
    assert report.bytes == sum(map(len, MODEL.values()))
    assert left_behind(root) == []


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_formats_of_tar_and_long_names_are_read(tmp_path: Path, root: Path, format: int) -> None:
    name = "/".join(["a" * 30] * 4) + "/ü.json" if format != tarfile.USTAR_FORMAT else "a/b/c.json"
    files = {**MODEL, name: b"{}", "empty": b""}
    (tmp_path / "m.tar").write_bytes(packed(files, format=format))
    assert derived(root, stage_small(str(tmp_path / "m.tar"), root)) == files


def test_what_the_tar_program_packs_is_read(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path, data in {**MODEL, "sub/notes.json": b"[]"}.items():
        (folder / path).write_bytes(data)
    assert (
        os.spawnlp(os.P_WAIT, "tar", "tar", "-C", str(folder), "-czf", str(tmp_path / "m.tar.gz"), ".") == 0
    )
    report = stage_small(str(tmp_path / "m.tar.gz"), root)
    assert derived(root, report) == {**MODEL, "sub/notes.json": b"[]"}


def test_staging_it_again_extracts_nothing_and_reads_nothing(root: Path) -> None:
    with FaultyServer({"model.tar.gz": packed(MODEL, "w:gz")}) as server:
        first = stage_small(f"{server.url}/model.tar.gz", root)
        links = {p: p.stat().st_ctime_ns for p in Path(first.path).rglob("*")}
        server.clear()
        second = stage_small(f"{server.url}/model.tar.gz", root)
        assert second.snapshot == first.snapshot
        assert second.sources == {"origin": 0, "peer": 0, "local": 0}
        assert server.bytes_sent("model.tar.gz") == 0
        assert second.notes == ()
        assert {p: p.stat().st_ctime_ns for p in Path(first.path).rglob("*")} == links


def test_a_new_archive_at_the_same_place_is_a_new_snapshot(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tar").write_bytes(packed(MODEL))
    first = stage_small(str(tmp_path / "m.tar"), root)
    newer = {**MODEL, "config.json": b"{}"}
    (tmp_path / "m.tar").write_bytes(packed(newer))
    second = stage_small(str(tmp_path / "m.tar"), root)
    assert derived(root, second) == newer
    assert derived(root, first) == MODEL
    # The shards are the same objects.
    shard = "model-00001-of-00002.safetensors"
    assert os.path.samefile(Path(first.path, shard), Path(second.path, shard))


def test_the_same_files_from_a_folder_and_an_archive_are_one_snapshot(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path, data in MODEL.items():
        (folder / path).write_bytes(data)
    publish(folder, str(folder), chunk=CHUNK)
    (tmp_path / "m.tar").write_bytes(packed(MODEL))
    for chunk in (CHUNK, 4 * CHUNK):
        first = stage_small(str(folder), root)
        second = stage_small(str(tmp_path / "m.tar"), root, chunk=chunk)
        assert second.snapshot == first.snapshot
        assert derived(root, second) == MODEL


def test_loading_waits_for_the_members(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tar.gz").write_bytes(packed(MODEL, "w:gz"))
    for _ in range(2):
        source = open_for_loading(str(tmp_path / "m.tar.gz"), root=str(root))
        try:
            assert set(source.paths()) == set(MODEL)
            for path, data in MODEL.items():
                file = source.open(path)
                file.wait(0, file.size)
                assert os.pread(file.fileno(), file.size, 0) == data
                file.close()
        finally:
            source.close()


def test_a_local_archive_is_loaded_from_its_members_too(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tgz").write_bytes(packed(MODEL, "w:gz"))
    for source in (str(tmp_path / "m.tgz"), tmp_path / "m.tgz", f"file://{tmp_path}/m.tgz"):
        opened = open_source(source, root=str(root))
        try:
            assert set(opened.paths()) == set(MODEL)
        finally:
            opened.close()


def test_patterns_choose_among_the_members(tmp_path: Path, root: Path) -> None:
    files = {**MODEL, "pytorch_model.bin": b"pickle", "code/inference.py": b"pass", "._config.json": b"x"}
    (tmp_path / "m.tar").write_bytes(packed(files))
    report = stage_small(str(tmp_path / "m.tar"), root)
    assert set(derived(root, report)) == {*MODEL, "code/inference.py"}
    assert {s.path for s in report.skipped} == {"pytorch_model.bin", "._config.json"}
    report = stage_small(str(tmp_path / "m.tar"), root, selection=Selection(("*.json",), ("._*",)))
    assert set(derived(root, report)) == {"config.json"}
    with pytest.raises(ArchiveError, match="check the patterns"):
        stage_small(str(tmp_path / "m.tar"), root, selection=Selection(("*.onnx",)))


def test_a_pytorch_archive_keeps_its_weights(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tar.gz").write_bytes(
        packed({"pytorch_model.bin": b"pickle", "config.json": b"{}"}, "w:gz")
    )
    assert set(derived(root, stage_small(str(tmp_path / "m.tar.gz"), root))) == {
        "pytorch_model.bin",
        "config.json",
    }


def test_a_signed_archive_is_unpacked_and_an_unsigned_one_is_refused(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.tar.gz").write_bytes(packed(MODEL, "w:gz"))
    key = tmp_path / "key.pem"
    assert (
        os.spawnlp(os.P_WAIT, "openssl", "openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)) == 0
    )
    trusted = (publish(folder, str(tmp_path / "out"), sign=key).key or "",)
    for _ in range(2):
        report = stage_small(str(tmp_path / "out"), root, require="signed", keys=trusted)
        assert derived(root, report) == MODEL
    # What was verified is remembered of the members, too.
    (tmp_path / "out").rename(tmp_path / "gone")
    report = stage_small(str(tmp_path / "out"), root, require="signed", keys=trusted, revalidate="never")
    assert derived(root, report) == MODEL
    with pytest.raises(SignatureError):
        stage_small(str(folder / "model.tar.gz"), root, require="signed", keys=trusted)


def symlink(member: tarfile.TarInfo) -> None:
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"


def hard_link(member: tarfile.TarInfo) -> None:
    member.type, member.linkname = tarfile.LNKTYPE, "config.json"


def device(member: tarfile.TarInfo) -> None:
    member.type, member.devmajor = tarfile.CHRTYPE, 1


def block_device(member: tarfile.TarInfo) -> None:
    member.type = tarfile.BLKTYPE


def pipe(member: tarfile.TarInfo) -> None:
    member.type = tarfile.FIFOTYPE


def sparse(member: tarfile.TarInfo) -> None:
    member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000"}


def unknown(member: tarfile.TarInfo) -> None:
    member.type = b"Z"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (symlink, "a link"),
        (hard_link, "a link"),
        (device, "a device"),
        (block_device, "a device"),
        (pipe, "a device or a pipe"),
        (sparse, "sparse"),
        (unknown, "unknown type"),
    ],
)
def test_what_is_neither_file_nor_folder_is_refused(
    tmp_path: Path, root: Path, change: Callable[[tarfile.TarInfo], None], says: str
) -> None:
    (tmp_path / "m.tar").write_bytes(with_member(change))
    refused(tmp_path, root, ArchiveError, says)


def refused(tmp_path: Path, root: Path, kind: type[HeadraceError], says: str) -> None:
    outside = {p for p in tmp_path.rglob("*") if root not in p.parents}
    with pytest.raises(kind, match=says) as caught:
        stage_small(str(tmp_path / "m.tar"), root)
    assert "\n" not in str(caught.value)
    assert set(visible(root)) <= {"m.tar"}
    assert left_behind(root) == []
    assert {p for p in tmp_path.rglob("*") if root not in p.parents} <= outside | {root}


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["../outside"], r"\.\."),
        (["a/../../outside"], r"\.\."),
        (["/etc/headrace-outside"], "absolute"),
        (["a//b"], "''"),
        (["a", "a"], "twice"),
        (["./a", "a"], "twice"),
        (["Config.json", "config.json"], "case or Unicode"),
        (["\u00e9", "e\u0301"], "case or Unicode"),
        (["a", "a/b"], "both as a file and as a folder"),
        (["line\nbreak"], "control"),
        (["back\\slash"], "backslash"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_paths_that_must_not_be_written_are_refused(
    tmp_path: Path, root: Path, paths: list[str], says: str, mode: str
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for path in paths:
            tar.addfile(tarfile.TarInfo(path))
    (tmp_path / "m.tar").write_bytes(buffer.getvalue())
    refused(tmp_path, root, UnsafePath, says)


def test_a_folder_named_like_a_file_or_leading_out_is_refused(tmp_path: Path, root: Path) -> None:
    def folder(path: str) -> Callable[[tarfile.TarInfo], None]:
        def change(member: tarfile.TarInfo) -> None:
            member.name, member.type = path, tarfile.DIRTYPE

        return change

    (tmp_path / "m.tar").write_bytes(with_member(folder("config.json")))
    refused(tmp_path, root, ArchiveError, "both as a file and as a folder")
    (tmp_path / "m.tar").write_bytes(with_member(folder("../up")))
    refused(tmp_path, root, UnsafePath, r"\.\.")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>no such key</html>", "no tar archive"),
        (b"PK\3\4" + bytes(2000), "no tar archive"),
        (gzip.compress(b"not a tar" * 1000, mtime=0), "no tar archive"),
        (packed(MODEL)[:1500], "truncated"),
        (packed(MODEL, "w:gz")[:-1000], "truncated"),
        (packed(MODEL, "w:gz")[:-8] + bytes(8), "damaged"),
        (packed(MODEL, "w:gz")[:20] + bytes(100), "damaged"),
    ],
)
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, root: Path, data: bytes, says: str) -> None:
    (tmp_path / "m.tar").write_bytes(data)
    refused(tmp_path, root, ArchiveError, says)


def test_an_archive_cut_between_two_members_is_refused(tmp_path: Path, root: Path) -> None:
    """There tar itself sees nothing but an end without its marker."""
    files = {"a.json": bytes(512), "b.json": bytes(512)}
    (tmp_path / "m.tar").write_bytes(packed(files)[:1024])
    refused(tmp_path, root, ArchiveError, "truncated")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, root: Path) -> None:
    data = bytearray(packed({"a.json": bytes(512), "b.json": bytes(512)}))
    data[1024 + 150] ^= 0xFF
    (tmp_path / "m.tar").write_bytes(data)
    refused(tmp_path, root, ArchiveError, "damaged")


def test_a_broken_checkpoint_in_an_archive_is_refused(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tar").write_bytes(packed({**MODEL, "model.safetensors": b"version https://git-lfs"}))
    refused(tmp_path, root, CheckpointError, "model.safetensors")


def staged_archive(tmp_path: Path, root: Path, data: bytes, limits: ArchiveLimits) -> Derived:
    """Stage the archive as a plain file beside another one, then unpack it with these limits."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.tar").write_bytes(data)
    (tmp_path / "in" / "other").write_bytes(b"")
    stage_small(str(tmp_path / "in"), root)
    (tmp_path / "in" / "other").unlink()
    with Store.open(root) as store:
        domain = store.domain()
        (whole,) = domain.snapshots()
        manifest = whole.manifest()
        alone = type(manifest)(
            tuple(f for f in manifest.files if f.path == "m.tar"), manifest.algorithm, uri=manifest.uri
        )
        snapshot = domain.make_snapshot(alone, store.tmp)
        snapshot.link(domain.object_files(alone), store.tmp)
        return asyncio.run(
            archive.derive(store, domain, snapshot, alone, "name", Selection(), chunk=CHUNK, limits=limits)
        )


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (ArchiveLimits(total=1 << 20), "unpacks to more than 1048576 bytes"),
        (ArchiveLimits(files=2), "more than 2 members"),
        (ArchiveLimits(single=1000), "more than the limit of 1000"),
    ],
)
def test_an_archive_over_its_limits_is_refused(
    tmp_path: Path, root: Path, limits: ArchiveLimits, says: str
) -> None:
    with pytest.raises(ArchiveError, match=says):
        staged_archive(tmp_path, root, packed(MODEL), limits)
    assert left_behind(root) == []
    assert "config.json" not in visible(root)


def test_an_archive_within_its_limits_is_unpacked(tmp_path: Path, root: Path) -> None:
    data = packed(MODEL)
    exact = ArchiveLimits(total=len(data), files=len(MODEL), single=max(map(len, MODEL.values())))
    assert set(staged_archive(tmp_path, root, data, exact).manifest.by_path) == set(MODEL)


def test_a_decompression_bomb_is_refused(tmp_path: Path, root: Path) -> None:
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=9) as file:
        member = tarfile.TarInfo("zeros.bin")
        member.size = 128 << 20
        file.write(member.tobuf())
        for _ in range(128):
            file.write(bytes(1 << 20))
    (tmp_path / "m.tar").write_bytes(buffer.getvalue())
    refused(tmp_path, root, ArchiveError, "bomb")


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path, root: Path) -> None:
    """An extended header may name any size, and is read whole."""
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 64 << 20
    (tmp_path / "m.tar").write_bytes(member.tobuf() + bytes(member.size) + packed(MODEL))
    refused(tmp_path, root, ArchiveError, "member header")


def test_a_size_that_no_file_has_is_refused(tmp_path: Path, root: Path) -> None:
    member = tarfile.TarInfo("huge.bin")
    member.size = 1 << 60
    (tmp_path / "m.tar").write_bytes(member.tobuf() + bytes(2048))
    refused(tmp_path, root, ArchiveError, "limit")
    member.size = -1
    (tmp_path / "m.tar").write_bytes(member.tobuf() + bytes(2048))
    refused(tmp_path, root, HeadraceError, "m.tar")


def test_too_little_space_is_said_with_what_is_missing(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    limits = ArchiveLimits(reserve=disk.free_bytes(root) * 2)
    with pytest.raises(NoSpace, match="too little space to unpack") as caught:
        staged_archive(tmp_path, root, packed(MODEL), limits)
    assert caught.value.missing > 0
    assert left_behind(root) == []


def test_cancelling_stops_the_unpacking_and_leaves_nothing(tmp_path: Path, root: Path) -> None:
    data = packed({f"{i}.bin": bytes(1 << 20) for i in range(64)})
    (tmp_path / "m.tar").write_bytes(data)
    stage_small(str(tmp_path / "m.tar"), root, selection=Selection(("0.bin",)))
    with Store.open(root) as store:
        domain = store.domain()
        snapshot = next(s for s in domain.snapshots() if archive.is_archive(s.manifest()))

        async def cancelled() -> None:
            job = asyncio.ensure_future(
                archive.derive(store, domain, snapshot, snapshot.manifest(), "name", Selection())
            )
            # Until its first member lies in the store's temporary folder.
            while not any(p.is_file() for p in store.tmp.rglob("*")):
                assert not job.done()
                await asyncio.sleep(0)
            job.cancel()
            await job

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled())
        assert left_behind(root) == []
        assert not any(s.name_for("name", Selection()) for s in domain.snapshots())


def test_a_kill_while_unpacking_costs_nothing_but_the_unpacking(tmp_path: Path, root: Path) -> None:
    files = {f"{i}.bin": os.urandom(1 << 20) for i in range(48)}
    program = "import sys; from headrace.cache.staging import stage; stage(sys.argv[1], root=sys.argv[2])"
    with FaultyServer({"m.tar": packed(files)}) as server:
        reference = f"{server.url}/m.tar"
        process = subprocess.Popen([sys.executable, "-c", program, reference, str(root)])
        with process:
            while not list(root.glob("tmp/*/archive-*/*")):
                assert process.poll() is None
                time.sleep(0.0005)
            process.kill()
        assert set(visible(root)) <= {"m.tar", *files}
        server.clear()
        assert derived(root, stage_small(reference, root)) == files
        assert server.bytes_sent("m.tar") == 0
    assert left_behind(root) == []


def test_an_evicted_derived_snapshot_is_extracted_again_without_the_origin(
    tmp_path: Path, root: Path
) -> None:
    with FaultyServer({"model.tar": packed(MODEL)}) as server:
        report = stage_small(f"{server.url}/model.tar", root)
        Path(report.path).rename(tmp_path / "gone")
        server.clear()
        again = stage_small(f"{server.url}/model.tar", root)
        assert derived(root, again) == MODEL
        assert server.bytes_sent("model.tar") == 0


def test_an_archive_among_other_files_is_left_as_it_is(tmp_path: Path, root: Path) -> None:
    files = {"model.tar.gz": packed(MODEL, "w:gz"), "readme.txt": b"x"}
    with FaultyServer(below("m", files)) as server:
        assert derived(root, stage_small(f"{server.url}/m", root)) == files


def test_a_derived_snapshot_is_held_open_like_any_other(tmp_path: Path, root: Path) -> None:
    (tmp_path / "m.tar").write_bytes(packed(MODEL))
    report = stage_small(str(tmp_path / "m.tar"), root)
    with Store.open(root, writable=False) as store:
        domain = store.domain()
        found = domain.find(f"file://{tmp_path}/m.tar")
        assert found.id == report.snapshot
        source = StoredSnapshot(domain, found)
        try:
            assert set(source.paths()) == set(MODEL)
        finally:
            source.close()
