"""Several processes of one node load together: one reading, the same tensors, and no rank left waiting."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.page_cache import kept
from support.ranks import Ended, Team
from support.safetensors_files import Entry, write_sharded

from headrace.loader import load
from headrace.loader.memory import resident

ROWS, COLUMNS, EACH = 1024, 1664, 12  # of BF16: 3.4 MB a tensor
SHARDS = ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors")


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with Team() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "model"
    shards = {
        shard: [
            Entry(name, "BF16", (ROWS, COLUMNS), random.Random(name).randbytes(2 * ROWS * COLUMNS))
            for name in (f"{shard[:7]}.{number}.weight" for number in range(EACH))
        ]
        for shard in SHARDS
    }
    write_sharded(folder, shards, "model.safetensors.index.json")
    return folder


@pytest.fixture(scope="module")
def digest(model: Path) -> str:
    return load(model).digest()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def size_of(model: Path) -> int:
    return sum((model / shard).stat().st_size for shard in SHARDS)


def make_cold(model: Path) -> None:
    """Drop the model from the page cache, and make sure of it."""
    for shard in SHARDS:
        descriptor = os.open(model / shard, os.O_RDWR)
        try:
            deadline = time.monotonic() + 10
            while True:  # a process that has it mapped may not be quite gone
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if resident(descriptor, 0, os.fstat(descriptor).st_size) == 0.0:
                    break
                if time.monotonic() > deadline:
                    pytest.skip("this file system keeps files in memory, so nothing can be read from a disk")
                time.sleep(0.05)
        finally:
            os.close(descriptor)


def load_cold(team: Team, store: Path, model: Path, count: int, **task: Any) -> list[Ended]:
    """Load what is not in memory. Again, if something else came off the disk too: Python's modules do, when they
    are imported for the first time, and are counted with the rest."""
    for _ in range(3):
        make_cold(model)
        ended = team.load(store, model, count, **task)
        if sum(said(ended, "disk")) <= 1.02 * size_of(model):
            break
    return ended


def said(ended: Sequence[Ended], word: str) -> list[Any]:
    assert [(one.code, one.said.get("message")) for one in ended] == [(0, None)] * len(ended)
    return [one.said[word] for one in ended]


def way(ended: Ended) -> str:
    return str(ended.said["explain"][-1])


# -- one reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("read_path", ["auto", "buffered"])
def test_ranks_read_each_byte_off_the_disk_once(
    ranks: int, read_path: str, team: Team, model: Path, digest: str, store: Path
) -> None:
    ended = load_cold(team, store, model, ranks, read_path=read_path)
    assert said(ended, "digest") == [digest] * ranks
    assert size_of(model) <= sum(said(ended, "disk")) <= 1.02 * size_of(model)
    assert all("page-cache" in way(one) for one in ended)


@pytest.mark.parametrize("ranks", [2, 4])
def test_direct_reads_are_broadcast_and_each_byte_is_read_once(
    ranks: int, team: Team, model: Path, digest: str, store: Path
) -> None:
    ended = load_cold(team, store, model, ranks, read_path="direct")
    assert said(ended, "digest") == [digest] * ranks
    disk = said(ended, "disk")
    assert size_of(model) <= sum(disk) <= 1.02 * size_of(model)
    assert max(disk) <= size_of(model) / ranks + 3 * (8 << 20), "the shares are not balanced"
    assert all("exchange" in way(one) and "direct" in one.said["read_path"] for one in ended)
    # What was read directly has left nothing in the page cache.
    with open(model / SHARDS[0], "rb") as file:
        assert (resident(file.fileno(), 1 << 20, size_of(model) // 3) or 0.0) < 0.1


def test_ranks_that_load_a_warm_model_read_nothing(team: Team, model: Path, digest: str, store: Path) -> None:
    with kept(*(model / shard for shard in SHARDS)):
        ended = team.load(store, model, 2)
    assert said(ended, "digest") == [digest] * 2
    assert sum(said(ended, "disk")) < 0.02 * size_of(model)
    assert said(ended, "read_path") == ["mapped"] * 2


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_all_ranks_are_read_once_together(dim: int, team: Team, model: Path, store: Path) -> None:
    ended = load_cold(team, store, model, 4, slice_dim=dim)
    assert said(ended, "right") == [True] * 4
    assert sum(said(ended, "disk")) <= 1.02 * size_of(model)


def test_a_selection_is_shared_too(team: Team, model: Path, store: Path) -> None:
    make_cold(model)
    names = [f"model-{shard}.{number}.weight" for shard in (1, 2, 3) for number in (0, 5, 11)]
    ended = team.load(store, model, 2, names=names)
    assert said(ended, "digest") == [load(model, names=names).digest()] * 2
    needed = len(names) * 2 * ROWS * COLUMNS
    assert sum(said(ended, "disk")) <= 1.02 * needed + 3 * (1 << 20)


def test_streams_share_one_reading(team: Team, model: Path, digest: str, store: Path) -> None:
    ended = load_cold(team, store, model, 2, take="stream")
    assert said(ended, "digest") == [digest] * 2
    assert sum(said(ended, "disk")) <= 1.02 * size_of(model)


@pytest.mark.parametrize("hand_over", ["page-cache", "exchange"])
def test_devices_are_filled_by_ranks_together(
    hand_over: str, team: Team, model: Path, digest: str, store: Path
) -> None:
    ended = load_cold(team, store, model, 2, device=True, ranks={"hand_over": hand_over})
    assert said(ended, "digest") == [digest] * 2
    assert sum(said(ended, "disk")) <= 1.02 * size_of(model)
    # No more of the device than the model, packed, and a block for each thread.
    assert all(room <= size_of(model) + 9 * (8 << 20) for room in said(ended, "room"))


def test_ranks_load_together_while_they_stage(
    team: Team, model: Path, digest: str, tmp_path: Path, store: Path
) -> None:
    ended = team.load(store, model, 2, reference=f"file://{model}", root=str(tmp_path / "root"))
    assert said(ended, "digest") == [digest] * 2
    assert all("page-cache" in way(one) for one in ended)


def test_ranks_load_together_again_and_again(team: Team, model: Path, digest: str, store: Path) -> None:
    ended = team.load(store, model, 2, times=3)
    assert said(ended, "digest") == [digest] * 2


# -- no rank left waiting --------------------------------------------------------------------------------


@pytest.mark.parametrize("read_path", ["auto", "direct"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_named_by_all_others(
    victim: int, read_path: str, team: Team, model: Path, store: Path
) -> None:
    make_cold(model)
    ended = team.load(
        store, model, 4, read_path=read_path, special={victim: {"at_block": 4, "signal": "SIGKILL"}}
    )
    assert ended[victim].code == -9
    others = [one for rank, one in enumerate(ended) if rank != victim]
    assert [one.said["error"] for one in others] == ["LoadError"] * 3
    assert {one.message.partition(":")[0] for one in others} == {
        f"loading together stopped, because rank {victim} ended, or gave up, before every rank had loaded"
    }


@pytest.mark.parametrize("read_path", ["auto", "direct"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_by_all_others(
    victim: int, read_path: str, team: Team, model: Path, store: Path
) -> None:
    make_cold(model)
    ended = team.load(
        store, model, 3, read_path=read_path, ranks={"timeout": 2.0},
        special={victim: {"at_block": 4, "signal": "SIGSTOP"}},
    )  # fmt: skip
    others = [one for rank, one in enumerate(ended) if rank != victim]
    assert [one.said["error"] for one in others] == ["LoadError"] * 2
    assert all(f"because rank {victim} gave no sign of life for 2 s" in one.message for one in others)


@pytest.mark.parametrize("read_path", ["auto", "direct"])
def test_a_rank_that_waits_for_its_disk_forever_is_named(
    read_path: str, team: Team, model: Path, store: Path
) -> None:
    make_cold(model)
    ended = team.load(
        store,
        model,
        3,
        read_path=read_path,
        ranks={"timeout": 2.0},
        special={1: {"sleep_at": 4, "threads": 1}},
    )
    for other in (ended[0], ended[2]):
        assert "because rank 1 has not loaded anything for 2 s" in other.message
        assert other.said["seconds"] < ended[1].said["seconds"]


@pytest.mark.parametrize("read_path", ["buffered", "direct"])
def test_a_rank_that_fails_says_why_to_all_others(
    read_path: str, team: Team, model: Path, store: Path
) -> None:
    make_cold(model)
    ended = team.load(store, model, 3, read_path=read_path, special={1: {"lose_at": 3}})
    assert "became shorter" in ended[1].message
    for other in (ended[0], ended[2]):
        assert other.message == f"loading together stopped, because rank 1 failed: {ended[1].message}"


def test_a_rank_that_never_loads_is_named(team: Team, model: Path, store: Path) -> None:
    ended = team.load(store, model, 3, ranks={"wait": 1.0}, special={1: {"absent": True}})
    assert ended[0].message == ended[2].message
    assert "rank 1 did not begin to load within 1 s" in ended[0].message


def test_ranks_wait_for_one_that_comes_later(team: Team, model: Path, digest: str, store: Path) -> None:
    ended = team.load(store, model, 3, special={0: {"after": 0.7}})
    assert said(ended, "digest") == [digest] * 3


# -- agreeing --------------------------------------------------------------------------------------------


def test_a_rank_with_another_selection_is_named(team: Team, model: Path, store: Path) -> None:
    ended = team.load(store, model, 3, special={1: {"names": ["model-1.0.weight"]}})
    assert {one.message for one in ended} == {ended[0].message}
    assert "the ranks do not agree on what to load" in ended[0].message
    assert "rank 1 has the selection '1 names and 0 patterns: model-1.0.weight'" in ended[0].message
    assert "rank 0 'everything'" in ended[0].message


def test_a_rank_with_another_file_is_named(team: Team, model: Path, tmp_path: Path, store: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        os.link(path, other / path.name)
    (other / SHARDS[1]).unlink()
    (other / SHARDS[1]).write_bytes((model / SHARDS[1]).read_bytes())  # equal, and another file
    ended = team.load(store, model, 3, special={2: {"model": str(other)}})
    assert {one.said["error"] for one in ended} == {"LoadError"}
    assert all(f"rank 2 has the place of {SHARDS[1]}" in one.message for one in ended)
    assert all("rank 1 has" not in one.message for one in ended)


def test_a_rank_with_other_tensors_is_named(team: Team, model: Path, tmp_path: Path, store: Path) -> None:
    other = tmp_path / "other"
    entries = [Entry("t", "BF16", (4, 4), bytes(32))]
    write_sharded(other, {shard: [e._replace(name=f"{shard}{e.name}") for e in entries] for shard in SHARDS})
    ended = team.load(store, model, 2, special={1: {"model": str(other)}})
    assert all(f"rank 1 has the size of {SHARDS[0]}" in one.message for one in ended)


def test_a_rank_that_asks_for_another_hand_over_is_named(team: Team, model: Path, store: Path) -> None:
    ended = team.load(store, model, 2, special={1: {"ranks": {"hand_over": "exchange"}}})
    assert all("rank 1 has the hand-over 'exchange', rank 0 'auto'" in one.message for one in ended)
