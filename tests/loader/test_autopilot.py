"""The autopilot: what it chooses where, that it changes its mind, what it remembers, and what it says."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.filling_source import FillingSource
from support.mounts import needs_root, tmpfs
from support.page_cache import device_bytes, drop, kept
from support.safetensors_files import entry, file_bytes
from support.tensors import bits

from headrace.cache.safetensors import read_header
from headrace.loader import history, load
from headrace.loader.choose import choose
from headrace.loader.memory import about_resident
from headrace.loader.pace import ENOUGH, Kind, Pace
from headrace.loader.plan import Selection, plan_file
from headrace.loader.readers.mapped import MappedReader
from headrace.loader.source import LocalFile

MIB = 1 << 20
KEY = "8:1 ext4"


@pytest.fixture(autouse=True)
def own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test knows what another measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = history.location()
    assert path is not None
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """40 MiB in 9 tensors, none of them aligned to anything."""
    folder = tmp_path / "model"
    folder.mkdir()
    block = random.Random(2).randbytes(5 * MIB)
    entries = [entry("first", "U8", (12_345,))]
    entries += [
        entry(f"t{number}", "BF16", (1,))._replace(shape=(len(block) // 2,), data=block)
        for number in range(8)
    ]
    (folder / "model.safetensors").write_bytes(file_bytes(entries, shift=2))
    return folder


def arrange(path: Path, present: float, block: int = MIB) -> None:
    """Let the page cache have this part of a file, evenly spread over its blocks."""
    drop(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read no further than asked
        due = 0.0
        for start in range(0, path.stat().st_size, block):
            due += present
            if due >= 1:
                due -= 1
                os.pread(file.fileno(), block, start)


def expected_of(folder: Path) -> dict[str, bytes]:
    return {name: bits(one) for name, one in load(folder, read_path="buffered").tensors.items()}


# -- what it chooses ------------------------------------------------------------------------------------


def test_what_is_in_the_page_cache_is_mapped(model: Path) -> None:
    with kept(model / "model.safetensors"):
        loaded = load(model)
    assert loaded.stats.read_path == "mapped"
    assert loaded.stats.explain == ("model.safetensors: mapped: all of it is in the page cache",)


def test_what_is_not_in_it_comes_directly_from_the_device(model: Path) -> None:
    expected = expected_of(model)
    arrange(model / "model.safetensors", 0.0)
    loaded = load(model)
    assert {name: bits(one) for name, one in loaded.tensors.items()} == expected
    (sentence,) = loaded.stats.explain
    assert sentence.startswith("model.safetensors: ")
    assert "0 % of it is in the page cache" in sentence
    assert "came directly from the device" in sentence
    assert "this device: " in sentence


@pytest.mark.parametrize("block", [64 * 1024, MIB, 8 * MIB])
@pytest.mark.parametrize("present", [0.25, 0.5, 0.75])
def test_what_is_partly_there_is_taken_from_both_and_right(block: int, present: float, model: Path) -> None:
    expected = expected_of(model)
    path = model / "model.safetensors"
    arrange(path, present, block)
    loaded = load(model)
    assert {name: bits(one) for name, one in loaded.tensors.items()} == expected


def test_of_a_half_warm_file_only_the_other_half_is_read_from_the_device(model: Path) -> None:
    path = model / "model.safetensors"
    arrange(path, 0.5)
    before = device_bytes()
    loaded = load(model)
    assert loaded.stats.read_path == "mixed"
    assert "came from the page cache" in loaded.stats.explain[0]
    # Half, what the header brought, and what the kernel read ahead of the one block that was tried.
    assert device_bytes() - before < 0.75 * path.stat().st_size


@needs_root
def test_files_in_memory_are_mapped(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "tmpfs", 16 * MIB) as point:
        (point / "m.safetensors").write_bytes(file_bytes([entry("a", "F32", (MIB,))]))
        loaded = load(point)
        assert loaded.stats.read_path == "mapped"
        del loaded


@needs_root
def test_a_fuse_mount_is_read_right_on_every_read_path(model: Path, tmp_path: Path) -> None:
    from benchmarks.fuse_files import served

    expected = expected_of(model)
    with served(model, tmp_path / "fuse") as point:
        for read_path in ("auto", "direct", "buffered", "mapped", "auto"):
            loaded = load(point, read_path=read_path)
            assert {name: bits(one) for name, one in loaded.tensors.items()} == expected
            del loaded


def test_what_is_being_staged_is_mapped(tmp_path: Path) -> None:
    content = file_bytes([entry("a", "U8", (3 * MIB,))])
    with FillingSource(tmp_path / "filling", {"m.safetensors": content}, MIB) as source:
        source.files["m.safetensors"].stage(0)
        order = [(path, number) for path, number in source.all_chunks() if number]
        thread = source.stage_in_background(order)
        loaded = load(source)
        thread.join()
        assert bits(loaded.tensors["a"]) == content[-3 * MIB :]


def test_what_would_not_fit_is_mapped_however_cold_it_is(model: Path) -> None:
    path = model / "model.safetensors"
    arrange(path, 0.0)
    file = LocalFile(path, "model.safetensors")
    try:
        plan = plan_file("model.safetensors", read_header(path), Selection())
        choice = choose(
            file, plan, "auto", pace=lambda: Pace(2), total=path.stat().st_size, free=path.stat().st_size
        )
        assert choice.fetch is None
        assert "would not fit well" in choice.why
        reader = choice.reader(file, plan)
        assert isinstance(reader, MappedReader)
        reader.close()
    finally:
        file.close()


def is_mapped(path: Path, known: dict[Kind, float]) -> bool:
    """What the autopilot chooses for a file of a device whose paces are these."""
    file = LocalFile(path, path.name)
    try:
        plan = plan_file(path.name, read_header(path), Selection())
        choice = choose(file, plan, "auto", pace=lambda: Pace(2, known), total=1, free=None)
        if choice.fetch is not None:
            choice.fetch.close()
        return choice.fetch is None
    finally:
        file.close()


KNOWN: list[tuple[dict[Kind, float], bool]] = [
    ({}, False),
    ({"direct": 1e9, "buffered": 1e9, "mapped": 1e9}, True),
    ({"direct": 7e9, "buffered": 3e9, "mapped": 2e9}, False),
    ({"direct": 1e9, "mapped": 1e9, "copied": 1e9}, True),
]


@pytest.mark.parametrize(("known", "mapped"), KNOWN)
def test_a_half_warm_file_is_mapped_where_that_was_fast(
    known: dict[Kind, float], mapped: bool, model: Path
) -> None:
    path = model / "model.safetensors"
    arrange(path, 0.5)
    assert is_mapped(path, known) == mapped


@pytest.mark.parametrize(("rate", "mapped"), [(1.05e9, False), (2e9, True)])
def test_a_cold_file_is_mapped_only_where_that_was_seen_to_be_clearly_faster(
    rate: float, mapped: bool, model: Path
) -> None:
    path = model / "model.safetensors"
    arrange(path, 0.0)
    assert is_mapped(path, {"direct": 1e9, "buffered": 0.9e9, "mapped": rate}) == mapped


@needs_root
def test_a_user_who_may_not_ask_the_kernel_is_not_told_that_everything_is_there(tmp_path: Path) -> None:
    """To them cachestat(2) is refused, and mincore(2) says that every page is present."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(64 * MIB))
    path.chmod(0o444)
    script = (
        "import os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDONLY)\n"
        "from headrace.loader.memory import resident\n"
        "os.setuid(65534)\n"
        "print(resident(file, 0, 64 << 20))\n"
        "os.read(file, 64 << 20)\n"
        "print(resident(file, 0, 64 << 20))\n"
    )
    arrange(path, 0.0)
    answer = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    cold, warm = map(float, answer.stdout.split())
    assert cold <= 0.2
    assert warm == 1.0


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """256 MiB in one tensor, which take no room on the disk."""
    path = tmp_path / "large.safetensors"
    header = json.dumps({"t": {"dtype": "U8", "shape": [256 * MIB], "data_offsets": [0, 256 * MIB]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 256 * MIB)
    return path


@pytest.mark.parametrize("block", [MIB, 8 * MIB])
@pytest.mark.parametrize("present", [0.0, 0.5, 1.0])
def test_a_few_parts_tell_how_much_of_a_large_file_the_page_cache_holds(
    present: float, block: int, large: Path
) -> None:
    arrange(large, present, block)
    with large.open("rb") as file:
        found = about_resident(file.fileno(), 0, 256 * MIB)
    assert found is not None
    assert abs(found - present) <= 0.15
    assert present == 0.5 or found == present


def test_a_mapped_file_whose_rest_was_not_there_has_it_read_at_once(large: Path) -> None:
    file = LocalFile(large, large.name)
    plan = plan_file(large.name, read_header(large), Selection())
    reader = MappedReader(file, plan)  # as if all of it had been found in the page cache
    waits = []
    try:
        first, second, *_ = reader.blocks()
        drop(large)
        for block in (first, second):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            reader.read(block)
            waits.append(resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before)
    finally:
        reader.close()
        file.close()
    assert waits[0] > 0
    assert waits[1] <= waits[0] / 4


# -- that it changes its mind ---------------------------------------------------------------------------


def run(pace: Pace, speeds: dict[str, float], blocks: int) -> list[str]:
    """Give a device of these rates to a pace; the ways it took."""
    ways: list[str] = []
    for _ in range(blocks):
        way = pace.next()
        ways.append(way)
        pace.record(way, 8 * MIB, 8 * MIB / speeds[way])
    return ways


def test_an_unknown_device_is_read_directly_and_tried_once_the_other_way() -> None:
    ways = run(Pace(2), {"direct": 2e9, "buffered": 1e9}, 16)
    assert ways.count("buffered") == 1
    assert ways.index("buffered") <= 3


def test_equal_ways_are_direct() -> None:
    assert run(Pace(2), {"direct": 1e9, "buffered": 1.05e9}, 200).count("buffered") <= 4


def test_a_device_that_the_page_cache_serves_better_is_soon_read_through_it() -> None:
    ways = run(Pace(2), {"direct": 1e9, "buffered": 5e9}, 200)
    assert ways.count("direct") <= 8


@pytest.mark.parametrize(("true", "other"), [("direct", "buffered"), ("buffered", "direct")])
def test_a_wrong_memory_is_corrected_midway(true: str, other: str) -> None:
    wrong: dict[Kind, float] = {"direct": 1e9, "buffered": 1e9}
    wrong[other] = 30e9  # type: ignore[index]
    ways = run(Pace(1, wrong), {true: 4e9, other: 0.5e9}, 300)
    assert ways[0] == other
    assert ways[60:].count(other) <= 3


def test_what_is_too_short_is_not_measured() -> None:
    pace = Pace(2)
    pace.record("direct", 4096, 1e-9)
    assert pace.rate("direct") is None
    assert pace.measured == 0


def test_rates_are_those_of_all_threads_together() -> None:
    pace = Pace(4, {"direct": 8e9})
    assert pace.rate("direct") == 8e9
    for _ in range(8):
        pace.record("direct", 8 * MIB, 8 * MIB / 1e9)
    assert pace.rates() == {"direct": pytest.approx(4e9)}


# -- what it remembers ----------------------------------------------------------------------------------


def test_a_large_enough_load_is_remembered_and_used(tmp_path: Path, own_history: Path) -> None:
    block = random.Random(3).randbytes(ENOUGH // 8)
    entries = [entry(f"t{n}", "U8", (1,))._replace(shape=(len(block),), data=block) for n in range(9)]
    path = tmp_path / "large.safetensors"
    path.write_bytes(file_bytes(entries))
    arrange(path, 0.0)
    load(path)
    (known,) = json.loads(own_history.read_text()).values()
    assert known["direct"] > 0
    key = history.device_key(path.stat())
    assert history.recall(own_history, key)["direct"] == known["direct"]


def test_a_small_load_leaves_nothing_behind(model: Path, own_history: Path) -> None:
    arrange(model / "model.safetensors", 0.0)
    load(model)
    assert not own_history.exists()


def test_rates_come_back_and_are_added_to(own_history: Path) -> None:
    assert history.recall(own_history, KEY) == {}
    assert history.remember(own_history, KEY, {"direct": 3e9})
    assert history.remember(own_history, KEY, {"buffered": 1e9})
    assert history.recall(own_history, KEY) == {"direct": 3e9, "buffered": 1e9}
    assert history.recall(own_history, "other") == {}
    assert [path.name for path in own_history.parent.iterdir()] == [own_history.name]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[1]", "null", '"x"', "\0\xff", "[" * 40_000, '{"8:1 ext4": 5}', '{"8:1 ext4": {}}',
     '{"8:1 ext4": {"time": "now", "direct": 1}}', '{"8:1 ext4": {"time": 1e999, "direct": 1}}',
     '{"8:1 ext4": {"time": 1, "direct": NaN}}', '{"8:1 ext4": {"time": 1, "direct": -1}}'],
)  # fmt: skip
def test_a_damaged_history_is_as_none_and_is_replaced(damage: str, own_history: Path, model: Path) -> None:
    own_history.parent.mkdir(parents=True)
    own_history.write_text(damage)
    assert history.recall(own_history, KEY) == {}
    assert len(load(model).tensors) == 9
    assert history.remember(own_history, KEY, {"direct": 2e9})
    assert history.recall(own_history, KEY) == {"direct": 2e9}


def test_a_history_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not history.remember(history.location(), KEY, {"direct": 1e9})
    assert not history.remember(None, KEY, {"direct": 1e9})
    assert len(load(model).tensors) == 9


def test_old_rates_are_not_believed(own_history: Path) -> None:
    history.remember(own_history, KEY, {"direct": 3e9})
    entries = json.loads(own_history.read_text())
    for moved in (-100 * 86400, +1000):  # long ago; by a clock that was ahead
        entries[KEY]["time"] = time.time() + moved
        own_history.write_text(json.dumps(entries))
        assert history.recall(own_history, KEY) == {}


def test_the_oldest_devices_are_forgotten(own_history: Path) -> None:
    for number in range(history.DEVICES + 5):
        history.remember(own_history, f"8:{number} xfs", {"direct": 1e9})
    assert len(json.loads(own_history.read_text())) == history.DEVICES
    assert history.recall(own_history, "8:0 xfs") == {}
    assert history.recall(own_history, f"8:{history.DEVICES + 4} xfs")


def test_a_device_is_named_by_number_and_file_system(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    key = history.device_key(tmp_path.stat())
    assert key.startswith(f"{os.major(number)}:{os.minor(number)} ")


def test_a_cold_file_comes_off_its_device_once(model: Path) -> None:
    path = model / "model.safetensors"
    arrange(path, 0.0)
    before = device_bytes()
    load(model)
    assert device_bytes() - before <= 1.02 * path.stat().st_size
