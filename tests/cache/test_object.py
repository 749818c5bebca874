"""Objects: claims exclude, marks survive, completion is final, recovery trusts nothing unproven."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cache import chunkmap
from headrace.cache import object as objects
from headrace.cache.chunkmap import ABSENT, DURABLE, WRITTEN, ChunkMap
from headrace.cache.digest import XXH3, chunk_digest
from headrace.cache.errors import Held, StoreError
from headrace.cache.grid import fixed
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter

DATA = bytes(range(256)) * 40
SPEC = ObjectSpec("id", "pin:x", fixed(len(DATA), 1024), XXH3)
COUNT = len(SPEC.grid)


@pytest.fixture
def folder(tmp_path: Path) -> ObjectFolder:
    (tmp_path / "objects").mkdir()
    (tmp_path / "tmp").mkdir()
    folder = ObjectFolder(tmp_path / "objects" / "id")
    objects.create(SPEC, folder, tmp_path / "tmp")
    return folder


@pytest.fixture
def writer(folder: ObjectFolder) -> Iterator[ObjectWriter]:
    writer = ObjectWriter(folder, SPEC)
    yield writer
    writer.close()


def fill(writer: ObjectWriter, first: int, last: int) -> None:
    assert writer.claim(first, last)
    for index in range(first, last):
        start, stop = SPEC.grid.span(index, index + 1)
        writer.write(DATA[start:stop], start)
        writer.mark(index, chunk_digest(XXH3, DATA[start:stop]))
    writer.release(first, last)


def test_room_is_not_reserved_again_for_what_is_all_there(writer: ObjectWriter) -> None:
    # A loader that began when every chunk was there takes a new time of change for other bytes.
    fill(writer, 0, COUNT)
    os.utime(writer.folder.partial, ns=(0, 0))
    writer.allocate()
    assert writer.folder.partial.stat().st_mtime_ns == 0


def test_a_claim_excludes_other_stagers_until_it_is_released(
    folder: ObjectFolder, writer: ObjectWriter
) -> None:
    other = ObjectWriter(folder, SPEC)
    assert writer.claim(2, 5)
    assert not other.claim(4, 6)
    assert other.claim(5, 6)
    writer.release(2, 5)
    assert other.claim(2, 5)
    other.close()


def test_a_claim_dies_with_its_holder(folder: ObjectFolder, writer: ObjectWriter) -> None:
    other = ObjectWriter(folder, SPEC)
    assert other.claim(0, COUNT)
    other.close()
    assert writer.claim(0, COUNT)


def test_what_another_marked_meanwhile_cannot_be_claimed(folder: ObjectFolder, writer: ObjectWriter) -> None:
    other = ObjectWriter(folder, SPEC)
    fill(other, 3, 4)
    other.close()
    assert not writer.claim(2, 5)
    assert not writer.claim(3, 4)
    assert writer.claim(2, 3)


def test_a_full_object_completes_into_a_final_file(folder: ObjectFolder, writer: ObjectWriter) -> None:
    fill(writer, 0, COUNT)
    assert writer.full
    assert not writer.complete
    assert writer.try_complete()
    assert folder.data.read_bytes() == DATA
    assert oct(folder.data.stat().st_mode & 0o777) == "0o444"
    assert not folder.partial.exists()
    assert set(writer.map.states()) == {DURABLE}


def test_completion_waits_for_stagers_that_still_have_it_open(
    folder: ObjectFolder, writer: ObjectWriter
) -> None:
    other = ObjectWriter(folder, SPEC)
    fill(writer, 0, COUNT)
    assert not writer.try_complete()
    assert other.try_complete()  # the other lets go of its own share by trying
    assert writer.try_complete()
    other.close()
    assert folder.data.read_bytes() == DATA


def test_an_open_map_keeps_its_bytes_through_completion(folder: ObjectFolder, writer: ObjectWriter) -> None:
    fd = os.open(folder.partial, os.O_RDONLY)
    fill(writer, 0, COUNT)
    assert writer.try_complete()
    assert os.path.samestat(os.fstat(fd), os.stat(folder.data))
    assert os.pread(fd, len(DATA), 0) == DATA
    os.close(fd)


def test_sync_makes_marks_durable(writer: ObjectWriter) -> None:
    fill(writer, 0, 3)
    assert writer.unsynced_bytes == 3 * 1024
    writer.sync()
    assert list(writer.map.states()[:4]) == [DURABLE] * 3 + [ABSENT]
    assert writer.unsynced_bytes == 0


def test_a_failed_sync_returns_what_was_only_written(
    writer: ObjectWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer, 0, 2)
    writer.sync()
    fill(writer, 2, 5)

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="Input/output"):
            writer.sync()
    assert list(writer.map.states()[:6]) == [DURABLE, DURABLE, ABSENT, ABSENT, ABSENT, ABSENT]


def test_after_a_reboot_written_chunks_are_hashed_and_wrong_ones_fetched_again(
    folder: ObjectFolder, writer: ObjectWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer, 0, 2)
    writer.sync()
    fill(writer, 2, 5)
    # As a power loss may leave it: chunk 3 marked, but its bytes never reached the disk.
    os.pwrite(writer.fileno(), b"\0" * 1024, 3 * 1024)
    writer.close()
    monkeypatch.setattr(chunkmap, "boot_id", lambda: "00000000-0000-0000-0000-000000000000")
    again = ObjectWriter(folder, SPEC)
    assert list(again.map.states()[:6]) == [DURABLE, DURABLE, WRITTEN, ABSENT, WRITTEN, ABSENT]
    assert again.map.current
    again.close()


def test_after_a_reboot_a_chunk_without_its_digest_is_not_trusted(
    folder: ObjectFolder, writer: ObjectWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer, 0, 2)
    writer.close()
    raw = folder.digests.read_bytes()
    folder.digests.write_bytes(raw[:64] + b"\0" * 48 + raw[112:])  # a slot that never reached the disk
    monkeypatch.setattr(chunkmap, "boot_id", lambda: "00000000-0000-0000-0000-000000000000")
    again = ObjectWriter(folder, SPEC)
    assert list(again.map.states()[:2]) == [ABSENT, WRITTEN]
    again.close()


def test_creating_twice_keeps_the_first(folder: ObjectFolder, writer: ObjectWriter, tmp_path: Path) -> None:
    fill(writer, 0, 1)
    objects.create(SPEC, folder, tmp_path / "tmp")
    assert writer.map.state(0) == WRITTEN
    assert not list((tmp_path / "tmp").iterdir())


def test_adopting_a_twin_makes_one_inode_and_marks_nothing_it_did_not_write(
    folder: ObjectFolder, writer: ObjectWriter, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    twin.write_bytes(DATA)
    reader = ChunkMap.open(folder.map, writable=False)
    assert writer.adopt(twin)
    assert os.path.samefile(twin, folder.data)
    assert writer.complete
    # A reader of the old `partial` would see zeros: the map must not call them readable.
    assert not reader.ready(0, 1)
    reader.close()


def test_a_twin_is_not_adopted_under_a_reader(
    folder: ObjectFolder, writer: ObjectWriter, tmp_path: Path
) -> None:
    from headrace.cache import locks

    twin = tmp_path / "twin"
    twin.write_bytes(DATA)
    fd = os.open(folder.lock, os.O_RDONLY)
    assert locks.try_lock(fd, objects.READERS, 1, exclusive=False)
    assert not writer.adopt(twin)
    os.close(fd)
    assert not writer.complete
    assert writer.adopt(twin)


def test_eviction_waits_for_stagers(folder: ObjectFolder, writer: ObjectWriter) -> None:
    assert objects.being_staged(folder)
    with pytest.raises(Held, match="being staged"):
        objects.lock_exclusively(folder, "eviction", timeout=0.05)
    writer.close()
    assert not objects.being_staged(folder)
    os.close(objects.lock_exclusively(folder, "eviction"))


def test_a_finished_file_moves_in_as_a_complete_object(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "tmp").mkdir()
    source = tmp_path / "tmp" / "file"
    source.write_bytes(DATA)
    folder = ObjectFolder(tmp_path / "objects" / "id")
    digests = [chunk_digest(XXH3, DATA[slice(*SPEC.grid.span(i, i + 1))]) for i in range(COUNT)]
    objects.create_complete(SPEC, folder, tmp_path / "tmp", source, digests)
    assert folder.complete
    assert folder.spec() == SPEC
    assert list(objects.learned_digests(folder, COUNT)) == digests
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("torn", ["map", "digests", "partial"])
def test_a_young_folder_torn_by_a_power_loss_is_not_opened(folder: ObjectFolder, torn: str) -> None:
    (folder.path / torn).write_bytes(b"")
    with pytest.raises(StoreError, match="verify"):
        ObjectWriter(folder, SPEC)
