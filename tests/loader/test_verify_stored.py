"""Verifying while loading from a real store: what it notes, and what the notes are good for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command
from support.faulty_server import FaultyServer
from support.models import below, grid_of, published, small_model, stage_small, visible
from support.mounts import needs_root
from support.stores import flip, opened, write_files

from headrace.cache import chunkmap
from headrace.cache.chunkmap import ABSENT, DURABLE, ChunkMap
from headrace.cache.errors import IntegrityError, UsageError
from headrace.cache.reading import StoredSnapshot, Verified
from headrace.cache.repair import repair
from headrace.cache.verify import verify as verify_stored
from headrace.loader import load
from headrace.loader.verify import VerifyMode

MODEL = small_model()
SHARDS = [path for path in MODEL if path.endswith(".safetensors")]
SIZE = sum(len(MODEL[path]) for path in SHARDS)
CHUNK = grid_of(SHARDS[0], MODEL[SHARDS[0]]).span(3, 4)
OTHER_BOOT = "0" * 36


@pytest.fixture(params=[False, True], ids=["learned", "published"])
def origin(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_files(tmp_path / "origin", published(MODEL) if request.param else MODEL)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def notes(root: Path, snapshot: str) -> list[Verified]:
    with opened(root, snapshot) as it:
        source = StoredSnapshot(it.domain, it.snapshot)
        try:
            found = []
            for path in SHARDS:
                file = source.open(path)
                found.append(file.verified())
                file.close()
            return found
        finally:
            source.close()


def set_notes(root: Path, snapshot: str, boot: bytes) -> None:
    with opened(root, snapshot) as it:
        for path in SHARDS:
            with open(it.object_of(path).map, "r+b") as file:
                file.seek(60)
                file.write(boot.ljust(36, b"\0"))


def verified(root: Path, snapshot: str, mode: VerifyMode) -> int:
    """Bytes that a load verifies."""
    with opened(root, snapshot) as it:
        source = StoredSnapshot(it.domain, it.snapshot)
        try:
            return load(source, verify=mode).stats.verified
        finally:
            source.close()


def test_what_was_staged_on_this_boot_is_not_verified_again_unless_asked(origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    assert notes(root, snapshot) == ["this boot"] * 2
    assert verified(root, snapshot, "auto") == 0
    assert verified(root, snapshot, "boot") == 0
    assert verified(root, snapshot, "always") == SIZE


def test_after_a_restart_boot_verifies_once(origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    set_notes(root, snapshot, OTHER_BOOT.encode())
    assert notes(root, snapshot) == ["earlier boot"] * 2
    assert verified(root, snapshot, "auto") == 0
    assert verified(root, snapshot, "boot") == SIZE
    assert notes(root, snapshot) == ["this boot"] * 2
    assert verified(root, snapshot, "boot") == 0


def test_what_was_never_verified_is_verified_once_without_being_asked(origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    set_notes(root, snapshot, b"")
    assert notes(root, snapshot) == ["never"] * 2
    assert verified(root, snapshot, "never") == 0
    assert verified(root, snapshot, "auto") == SIZE
    assert notes(root, snapshot) == ["this boot"] * 2
    assert verified(root, snapshot, "auto") == 0


@pytest.mark.parametrize("by", ["load", "verify"])
def test_a_wrong_chunk_is_remembered_until_it_is_repaired(by: str, origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    start, stop = CHUNK
    with opened(root, snapshot) as it:
        flip(it.data_of(SHARDS[0]), start + 100)
        if by == "verify":
            assert not verify_stored(it.store, it.domain, it.snapshot).ok
    words = rf"chunk 3 of {SHARDS[0]}, bytes {start} to {stop}, with layers\.1\.\d+\.weight.*--repair`$"
    if by == "load":
        with pytest.raises(IntegrityError, match=words):
            verified(root, snapshot, "always")
    assert notes(root, snapshot)[0] == "never"
    for _ in range(2):
        with pytest.raises(IntegrityError, match=words):
            verified(root, snapshot, "auto")
    with opened(root, snapshot) as it:
        repair(it.store, it.domain, it.snapshot)
    assert notes(root, snapshot) == ["this boot"] * 2
    assert verified(root, snapshot, "always") == SIZE


def test_bytes_are_verified_while_they_are_staged(origin: Path, root: Path) -> None:
    stats = load(
        str(origin) + "/", root=str(root), verify="never"
    ).stats  # a folder that exists is read in place
    assert (stats.snapshot, stats.verified) == (None, 0)
    files = {path: path_bytes for path in origin.iterdir() if (path_bytes := path.read_bytes())}
    with FaultyServer({f"model/{p.name}": data for p, data in files.items()}, rate=4e6) as server:
        loaded = load(f"{server.url}/model", root=str(root), verify="always")
        assert loaded.stats.verified == SIZE
        assert loaded.digest() == load(origin).digest()


def test_what_was_staged_across_a_restart_is_verified_when_it_is_first_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first chunks are believed, because they were synced; whoever loads it reads them again."""
    with FaultyServer(below("model", published(MODEL))) as server:
        reference = f"{server.url}/model"
        snapshot = stage_small(reference, root).snapshot
        with opened(root, snapshot) as it:
            shutil.rmtree(it.snapshot.files)
            for number, path in enumerate(SHARDS):
                # As it was at the moment of the power loss: the last chunk absent, the others synced.
                folder = it.object_of(path)
                folder.data.rename(folder.partial)
                folder.partial.chmod(0o600)
                with ChunkMap.open(folder.map, writable=True) as chunk_map:
                    states = chunk_map.states()
                    assert set(states) == {DURABLE}
                    for index in range(len(states) - 1 if number == 0 else 0, len(states)):
                        chunk_map.mark(index, ABSENT)
        monkeypatch.setattr(chunkmap, "boot_id", lambda: OTHER_BOOT)
        assert stage_small(reference, root).snapshot == snapshot
        assert visible(root) == MODEL
        # The other had nothing that had to be believed.
        assert notes(root, snapshot) == ["never", "this boot"]
        assert verified(root, snapshot, "auto") == len(MODEL[SHARDS[0]])
        assert notes(root, snapshot) == ["this boot"] * 2
        assert verified(root, snapshot, "auto") == 0


def test_a_load_takes_no_note_of_a_file_that_a_repair_has_replaced(origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        source = StoredSnapshot(it.domain, it.snapshot)
        file = source.open(SHARDS[0])
        flip(it.data_of(SHARDS[0]), CHUNK[0])
        repair(it.store, it.domain, it.snapshot)
        file.note_verified(good=False)  # of the inode that is no longer shown
        assert file.verified() == "this boot"
        file.close()
        source.close()


def test_a_note_of_an_evicted_object_is_no_error(origin: Path, root: Path) -> None:
    snapshot = stage_small(str(origin), root).snapshot
    with opened(root, snapshot) as it:
        source = StoredSnapshot(it.domain, it.snapshot)
        file = source.open(SHARDS[0])
        shutil.rmtree(it.object_of(SHARDS[0]).path)
        file.note_verified(good=True)
        assert file.verified() == "unknown"
        file.close()
        source.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that others may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


_AS_NOBODY = """
import os, sys
from headrace.cache.errors import HeadraceError
from headrace.cache.reading import StoredSnapshot
from headrace.cache.store import Store
from headrace.loader import load
os.setgroups([]); os.setgid(65534); os.setuid(65534)
root, snapshot_id = sys.argv[1:]
with Store.open(root, writable=False) as store:
    domain = store.domain()
    source = StoredSnapshot(domain, domain.snapshot(snapshot_id))
    for mode in ("auto", "boot", "always"):
        try:
            print(mode, load(source, verify=mode).stats.verified)
        except HeadraceError as error:
            print(mode, type(error).__name__, error)
    source.close()
"""


@needs_root
@pytest.mark.parametrize("publish", [False, True])
def test_another_user_verifies_by_published_digests_and_takes_no_notes(place: Path, publish: bool) -> None:
    files = published(MODEL) if publish else MODEL
    snapshot = stage_small(str(write_files(place / "origin", files)), place / "store").snapshot
    set_notes(place / "store", snapshot, OTHER_BOOT.encode())
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", _AS_NOBODY, str(place / "store"), snapshot],
        capture_output=True, text=True, env={"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(place)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    auto, boot, always = answer.stdout.splitlines()
    assert auto == "auto 0"
    if publish:
        assert (boot, always) == (f"boot {SIZE}", f"always {SIZE}")
    else:
        assert boot.startswith(
            "boot UsageError model-00001-of-00002.safetensors cannot be verified by this user"
        )
        assert "its owner alone" in always
    assert notes(place / "store", snapshot) == ["earlier boot"] * 2


def test_the_command_verifies_and_says_so(root: Path, tmp_path: Path) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        reference = f"{server.url}/model"
        run = Command(tmp_path, root)
        assert run("load", reference, "--verify", "always", "--json").json["verified"] == SIZE
        assert run("load", reference, "--json").json["verified"] == 0
        snapshot = run("load", reference, "--verify", "boot", "--json").json["snapshot"]
        with opened(root, snapshot) as it:
            flip(it.data_of(SHARDS[1]), 5000)
        failed = run("load", reference, "--verify", "always", "--json", code=IntegrityError.exit_code)
        assert "does not have its digest: run `headrace verify --repair`" in failed.json["error"]["message"]
        folder = write_files(tmp_path / "folder", MODEL)
        refused = run("load", folder, "--verify", "always", code=UsageError.exit_code)
        assert "has no digests" in refused.err
