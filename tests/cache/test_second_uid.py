"""Another user reads what is complete, and nothing else; it writes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import published, small_model, stage_small, visible
from support.mounts import needs_root
from support.stores import opened, write_files

from headrace.cache.errors import Held
from headrace.cache.evict import remove

NOBODY = 65534
MODEL = small_model()
SHARD = "model-00001-of-00002.safetensors"

_PRELUDE = """
import hashlib, os, sys
from pathlib import Path
from headrace.cache import archive, config, digest, grid, manifest, reading, verify
from headrace.cache.errors import HeadraceError
from headrace.cache.store import Store

root, snapshot_id = Path(sys.argv[1]), sys.argv[2]
# What is imported late has to be there before the rights go: the interpreter may lie in root's home.
hashlib.sha256()
b"x".decode("unicode_escape")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach, as a node's store is."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(code: str, root: Path, snapshot: str) -> list[str]:
    """The lines that a process of another user prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PRELUDE + code, str(root), snapshot]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def staged(place: Path, files: dict[str, bytes]) -> str:
    return stage_small(str(write_files(place / "origin", files)), place / "store").snapshot


@needs_root
def test_complete_files_are_read_by_anyone(place: Path) -> None:
    previous = os.umask(0o077)
    try:
        snapshot = staged(place, {**MODEL, "sub/vocab.txt": b"x"})
    finally:
        os.umask(previous)
    code = """
folder = root / "domains/default/snapshots" / snapshot_id / "files"
for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    print(path.relative_to(folder), len(path.read_bytes()))
"""
    expected = {f"{path} {len(data)}" for path, data in {**MODEL, "sub/vocab.txt": b"x"}.items()}
    assert set(as_nobody(code, place / "store", snapshot)) == expected


@needs_root
def test_a_loader_of_another_user_opens_and_holds_a_complete_snapshot(place: Path) -> None:
    snapshot = staged(place, MODEL)
    code = f"""
with Store.open(root, writable=False) as store:
    domain = store.domain()
    source = reading.StoredSnapshot(domain, domain.snapshot(snapshot_id))
    file = source.open({SHARD!r})
    file.wait(0, file.size, timeout=1)
    print(hashlib.sha256(os.pread(file.fileno(), file.size, 0)).hexdigest(), flush=True)
    file.close()
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PRELUDE + code, str(place / "store"), snapshot]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert len(child.stdout.readline()) == 65
        with opened(place / "store", snapshot) as it:
            with pytest.raises(Held, match="a reader has it open"):
                remove(it.store, it.domain, it.snapshot)
            child.kill()
            child.wait()
            remove(it.store, it.domain, it.snapshot)


@needs_root
def test_maps_locks_and_unfinished_bytes_are_nobody_elses(place: Path) -> None:
    snapshot = staged(place, MODEL)
    with opened(place / "store", snapshot) as it:
        folder = it.object_of(SHARD)
        folder.data.rename(folder.partial)
        folder.partial.chmod(0o600)
    code = """
for path in sorted(root.glob("domains/*/objects/*/*")):
    for flags in (os.O_RDONLY, os.O_RDWR):
        try:
            os.close(os.open(path, flags))
            print(path.name, "read" if flags == os.O_RDONLY else "write")
        except PermissionError:
            pass
"""
    allowed = set(as_nobody(code, place / "store", snapshot))
    assert allowed == {"data read", "grid read"}


@needs_root
def test_another_users_store_is_not_opened_for_writing(place: Path) -> None:
    snapshot = staged(place, MODEL)
    code = """
try:
    Store.open(root)
except HeadraceError as error:
    print(type(error).__name__, error)
"""
    (line,) = as_nobody(code, place / "store", snapshot)
    assert line.startswith("StoreNotWritable")
    assert "belongs to uid 0" in line
    assert visible(place / "store") == MODEL


@needs_root
def test_another_tenants_domain_is_not_listed(place: Path) -> None:
    origin = write_files(place / "origin", MODEL)
    snapshot = stage_small(str(origin), place / "store", domain="tenant-a").snapshot
    staged(place, MODEL)
    code = """
with Store.open(root, writable=False) as store:
    print([domain.name for domain in store.domains()])
try:
    os.listdir(root / "domains/tenant-a")
except PermissionError:
    print("refused")
"""
    assert as_nobody(code, place / "store", snapshot) == ["['default']", "refused"]


@needs_root
def test_another_user_verifies_by_published_digests(place: Path) -> None:
    snapshot = staged(place, published(MODEL))
    code = """
with Store.open(root, writable=False) as store:
    domain = store.domain()
    report = verify.verify(store, domain, domain.snapshot(snapshot_id))
    print(report.ok, report.bytes, report.unknown)
"""
    assert as_nobody(code, place / "store", snapshot) == [f"True {sum(map(len, MODEL.values()))} ()"]
