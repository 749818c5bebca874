"""Direct reads: the right bytes at any alignment, from the device, and never where they must not be."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.filling_source import FillingSource
from support.host_device import HostDevice
from support.mounts import needs_root
from support.page_cache import device_bytes, drop
from support.safetensors_files import entry, file_bytes
from support.tensors import bits

from headrace.cache.errors import LoadError
from headrace.loader import load, stream
from headrace.loader.memory import anonymous, as_bytes, resident, whole_pages
from headrace.loader.pace import Pace
from headrace.loader.plan import PAGE
from headrace.loader.readers.adaptive import AdaptiveFetch
from headrace.loader.readers.direct import DirectFetch, DirectRefusedError
from headrace.loader.source import LocalFile

MIB = 1 << 20


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[tuple[LocalFile, bytes]]:
    """A file that ends within a sector, and its content."""
    content = random.Random(5).randbytes(3 * MIB + 777)
    (tmp_path / "sample").write_bytes(content)
    file = LocalFile(tmp_path / "sample", "sample")
    yield file, content
    file.close()


def fetch_or_skip(file: LocalFile) -> DirectFetch:
    try:
        return DirectFetch(file)
    except DirectRefusedError as refusal:
        pytest.skip(f"no direct reads here: {refusal}")


def test_any_range_of_a_file_is_read_to_where_it_belongs(sample: tuple[LocalFile, bytes]) -> None:
    file, content = sample
    fetch = fetch_or_skip(file)
    choose = random.Random(1)
    end = len(content)
    ranges = [(0, end), (0, 1), (end - 1, end), (PAGE, 2 * PAGE), (PAGE - 1, PAGE + 1), (end - 777, end)]
    ranges += [tuple(sorted(choose.sample(range(end + 1), 2))) for _ in range(50)]  # type: ignore[misc]
    try:
        for start, stop in ranges:
            image = anonymous(start % PAGE + stop - start, "a test")
            fetch.bring(whole_pages(image, start % PAGE, start % PAGE + stop - start), start, stop)
            assert bytes(as_bytes(image[start % PAGE :])) == content[start:stop], (start, stop)
    finally:
        fetch.close()


def test_a_file_that_ends_too_early_is_an_error(sample: tuple[LocalFile, bytes]) -> None:
    file, content = sample
    fetch = fetch_or_skip(file)
    image = anonymous(len(content), "a test")
    try:
        for size in (2 * MIB, 2 * MIB + 100, 0):
            os.truncate(f"/proc/self/fd/{file.fileno()}", size)
            with pytest.raises(LoadError, match="sample became shorter than its 3146505 bytes"):
                fetch.bring(whole_pages(image, 0, len(content)), 0, len(content))
    finally:
        fetch.close()


@pytest.mark.parametrize("shift", [0, 1, 7, 4095])
def test_what_is_loaded_came_from_the_device_and_not_through_the_page_cache(
    shift: int, tmp_path: Path
) -> None:
    entries = [entry("a", "BF16", (5 * MIB,)), entry("b", "U8", (12_345,)), entry("c", "F32", (3, MIB))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(entries, shift=shift))
    drop(path)
    before = device_bytes()
    loaded = load(path, read_path="direct")
    assert device_bytes() - before >= path.stat().st_size - MIB
    with path.open("rb") as file:
        part = resident(file.fileno(), MIB, path.stat().st_size)
    assert part is not None and part < 0.01  # the header's pages are all
    assert loaded.stats.read_path == "direct"
    assert "model.safetensors: direct: as asked; 100% came directly" in loaded.stats.explain[0]
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
        e.name: e.data for e in entries
    }


def test_what_the_page_cache_has_is_read_again_where_direct_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes([entry("a", "U8", (4 * MIB,))]))
    drop(path)
    path.read_bytes()
    before = device_bytes()
    load(path, read_path="direct")
    assert device_bytes() - before >= 4 * MIB


def test_selected_tensors_are_right_wherever_they_begin_and_end(tmp_path: Path) -> None:
    sizes = [1, 4095, 4096, 300_001, 70_000, 5_000_000, 2, 90_000, 8191, 200_000]
    entries = [entry(f"t{number}", "U8", (size,), number) for number, size in enumerate(sizes)]
    (tmp_path / "m.safetensors").write_bytes(file_bytes(entries, shift=3))
    choose = random.Random(3)
    for _ in range(12):
        names = choose.sample([one.name for one in entries], choose.randint(1, 5))
        loaded = load(tmp_path, names=names, read_path="direct")
        assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
            one.name: one.data for one in entries if one.name in names
        }
        streamed = {name: bits(tensor) for name, tensor in stream(tmp_path, names=names, read_path="direct")}
        assert streamed == {name: bits(tensor) for name, tensor in loaded.tensors.items()}


def test_a_device_is_filled_from_direct_reads(tmp_path: Path) -> None:
    entries = [entry(f"t{number}", "BF16", (1_500_001,), number) for number in range(8)]
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes(entries, shift=5))
    drop(path)
    with HostDevice(delay=0.001) as device:
        loaded = load(path, device, read_path="direct", threads=2)
        assert {name: bits(one) for name, one in loaded.tensors.items()} == {e.name: e.data for e in entries}
        assert loaded.stats.read_path == "direct"


def test_an_object_that_is_still_being_written_is_never_read_directly(tmp_path: Path) -> None:
    content = file_bytes([entry("a", "U8", (2 * MIB,))])
    with FillingSource(tmp_path / "model", {"model.safetensors": content}, MIB) as source:
        with pytest.raises(DirectRefusedError, match="still being written"):
            DirectFetch(source.files["model.safetensors"])
        order = source.all_chunks()
        thread = threading.Timer(0.05, lambda: source.stage_in_background(order).join())
        source.files["model.safetensors"].stage(0)
        thread.start()
        loaded = load(source, read_path="direct")
        thread.join()
    assert loaded.stats.read_path == "buffered"
    assert "not directly as asked, because it is still being written" in loaded.stats.explain[0]
    assert bits(loaded.tensors["a"]) == content[-2 * MIB :]


@needs_root
def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(tmp_path: Path) -> None:
    """ramfs refuses O_DIRECT."""
    point = tmp_path / "ramfs"
    point.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "headrace-test", str(point)], check=True)
    try:
        one = entry("a", "F32", (MIB,))
        (point / "m.safetensors").write_bytes(file_bytes([one]))
        loaded = load(point, read_path="direct")
        assert bits(loaded.tensors["a"]) == one.data
    finally:
        subprocess.run(["umount", str(point)], check=True)
    assert loaded.stats.read_path == "buffered"
    assert "because it cannot be opened for direct reads (Invalid argument)" in loaded.stats.explain[0]


def test_a_first_read_that_is_refused_is_done_through_the_page_cache(sample: tuple[LocalFile, bytes]) -> None:
    """File systems with larger blocks answer EINVAL, as most do for memory that is not aligned at all."""
    file, content = sample
    direct = fetch_or_skip(file)
    memory = as_bytes(anonymous(len(content) + 2 * PAGE, "a test"))[1:]
    try:
        direct.bring(memory[: 4 * PAGE], 0, 4 * PAGE)
    except DirectRefusedError:
        pass
    else:
        direct.close()
        pytest.skip("this file system reads directly into any memory (tmpfs does)")
    fetch = AdaptiveFetch(file, direct, Pace(1), always_direct=True)
    try:
        for start in range(0, len(content), MIB):
            stop = min(start + MIB, len(content))
            fetch.bring(memory[start : start + -(-(stop - start) // PAGE) * PAGE], start, stop)
        assert bytes(memory[: len(content)]) == content
        assert fetch.name == "buffered"
        assert (
            "not directly, because its file system refuses direct reads (Invalid argument)" in fetch.outcome()
        )
    finally:
        fetch.close()
