"""Loading a model that is still being staged: no unready byte is ever seen, and nothing is waited for twice."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.filling_source import FillingSource
from support.host_device import HostDevice
from support.safetensors_files import entry, file_bytes

from headrace.cache.errors import CheckpointError, StagingStopped
from headrace.loader import api, load, plan, stream
from headrace.loader.choose import ReadPath
from headrace.loader.memory import as_bytes

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct", "auto")
CHUNK = 100_000  # neither a page nor a tensor boundary
SMALL_BLOCK = 64 * 1024

SHARDS = {
    f"model-{shard}.safetensors": [
        entry(f"{shard}.{number}", dtype, (size,))
        for number, (dtype, size) in enumerate(
            [
                ("BF16", 30_000),
                ("F32", 500),
                ("U8", 7),
                ("F32", 250_000),
                ("I64", 0),
                ("BF16", 90_001),
                ("F16", 40),
            ]
        )
    ]
    for shard in "abc"
}
CONTENT = {path: file_bytes(entries) for path, entries in SHARDS.items()}
EXPECTED = {one.name: one.data for entries in SHARDS.values() for one in entries}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor.contiguous().view(-1).view(torch.uint8))) if tensor.numel() else b""


@pytest.fixture
def filling(tmp_path: Path) -> Iterator[FillingSource]:
    with FillingSource(tmp_path / "model", CONTENT, CHUNK) as source:
        yield source


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("seed", range(4))
def test_a_load_during_staging_in_any_order_is_right(
    read_path: ReadPath, seed: int, filling: FillingSource
) -> None:
    order = filling.all_chunks()
    random.Random(seed).shuffle(order)
    thread = filling.stage_in_background(order)
    loaded = load(filling, read_path=read_path, threads=3)
    # Copied at once: what a too early read saw cannot be put right by staging that goes on.
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == EXPECTED
    thread.join()


@pytest.mark.parametrize("read_path", PATHS)
def test_a_stream_yields_each_tensor_when_its_own_bytes_are_there(
    read_path: ReadPath, filling: FillingSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are staged one at a time, and only when nothing more can come of those before."""
    monkeypatch.setattr(plan, "BLOCK", SMALL_BLOCK)  # many blocks in little data
    order = filling.all_chunks()
    random.Random(7).shuffle(order)
    heads = {path: (path, 0) for path in filling.files}
    order = [*heads.values(), *(chunk for chunk in order if chunk not in heads.values())]
    for path in heads:
        filling.files[path].stage(0)
    got: dict[str, bytes] = {}
    arrived = threading.Semaphore(0)
    failures: list[BaseException] = []

    def consume() -> None:
        try:
            for name, tensor in stream(filling, read_path=read_path, threads=2):
                got[name] = bits(tensor)  # now, while most of the files is garbage
                tensor.zero_()  # the neighbours that share its pages must not suffer
                arrived.release()
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            for _ in EXPECTED:
                arrived.release()

    consumer = threading.Thread(target=consume)
    consumer.start()
    taken = 0
    for done in range(len(heads), len(order) + 1):
        staged = set(order[:done])
        due = {
            one.name for path, entries in SHARDS.items() for one in entries if _due(path, one.name, staged)
        }
        while taken < len(due):
            assert arrived.acquire(timeout=60)
            taken += 1
        assert not failures
        assert set(got) == due
        if done < len(order):
            path, number = order[done]
            filling.files[path].stage(number)
    consumer.join()
    assert got == EXPECTED


def _due(path: str, name: str, staged: set[tuple[str, int]]) -> bool:
    """Whether all blocks that a tensor touches lie in staged chunks."""
    content = CONTENT[path]
    data_start = start = len(content) - sum(len(one.data) for one in SHARDS[path])
    for one in SHARDS[path]:
        stop = start + len(one.data)
        if one.name == name:
            first = max(start // SMALL_BLOCK * SMALL_BLOCK, data_start // 4096 * 4096)
            last = min(-(-stop // SMALL_BLOCK) * SMALL_BLOCK, len(content))
            chunks = range(first // CHUNK, -(-last // CHUNK))
            return not one.data or all((path, number) in staged for number in chunks)
        start = stop
    raise AssertionError(name)


def test_blocks_that_are_ready_are_read_before_those_that_are_not(tmp_path: Path) -> None:
    entries = [entry(f"t{number}", "U8", (8 << 20,), number) for number in range(5)]
    content = file_bytes(entries)
    with FillingSource(tmp_path, {"model.safetensors": content}, 1 << 20) as source:
        file = source.files["model.safetensors"]
        file.stage(0)  # the header
        tensors = stream(source, read_path="buffered", threads=2)
        for number in (4, 3, 2, 1, 0):
            for chunk in range(8 * number, min(8 * number + 9, file.chunks)):
                file.stage(chunk)
            assert next(tensors)[0] == f"t{number}"
        assert list(tensors) == []


def test_writing_to_a_streamed_tensor_leaves_its_unstaged_neighbour_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private copy of the page that both share, made too early, would keep the neighbour's garbage."""
    monkeypatch.setattr(api, "_STREAM_IMAGE", 1)  # every tensor is read by itself
    entries = [entry(f"t{number}", "U8", (10_000,)) for number in range(6)]
    content = file_bytes(entries, align=1000)
    assert (len(content) - 60_000) % 1000 == 0
    with FillingSource(tmp_path, {"model.safetensors": content}, 1000) as source:
        file = source.files["model.safetensors"]
        got: dict[str, bytes] = {}
        came = threading.Condition()

        def consume() -> None:
            for name, tensor in stream(source, read_path="mapped", threads=2):
                with came:
                    got[name] = bits(tensor)
                    came.notify_all()
                tensor.zero_()

        consumer = threading.Thread(target=consume)
        consumer.start()
        for number in range(file.chunks):
            file.stage(number)
            staged = (number + 1) * 1000 - (len(content) - 60_000)
            if staged > 0 and staged % 10_000 == 0:  # a tensor's last byte, in the middle of a page
                with came:
                    came.wait_for(lambda: len(got) * 10_000 >= staged, 0.1)  # noqa: B023
        consumer.join()
        assert got == {one.name: one.data for one in entries}


def test_waiting_readers_ask_for_the_first_blocks_first(filling: FillingSource) -> None:
    thread = threading.Thread(target=lambda: load(filling, threads=2))
    thread.start()
    first = filling.files["model-a.safetensors"]
    while not first.wanted:
        pass
    assert first.wanted[0] == (0, 8)
    assert not any(file.wanted for file in list(filling.files.values())[1:])
    filling.stage_in_background(filling.all_chunks()).join()
    thread.join()


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("staged", [0, 1, 9])
def test_when_nobody_stages_any_more_the_load_fails_and_ends(
    read_path: ReadPath, staged: int, filling: FillingSource
) -> None:
    thread = filling.stage_in_background(filling.all_chunks()[:staged])
    with pytest.raises(StagingStopped, match="nobody stages"):
        load(filling, read_path=read_path)
    thread.join()


def test_what_a_stream_gave_before_it_failed_is_right(filling: FillingSource) -> None:
    order = filling.all_chunks()
    for path in filling.files:
        filling.files[path].stage(0)
    got = {}
    with pytest.raises(StagingStopped):
        for name, tensor in stream(filling):
            got[name] = bits(tensor)
            if len(got) == 3:  # those without bytes
                whole = [chunk for chunk in order if chunk[0] == "model-a.safetensors"]
                thread = filling.stage_in_background(whole)
    thread.join()
    assert all(EXPECTED[name] == data for name, data in got.items())
    assert 3 <= len(got) <= 3 + len(SHARDS["model-a.safetensors"])


def test_a_closed_stream_stops_while_staging_goes_on(filling: FillingSource) -> None:
    first = filling.files["model-a.safetensors"]
    for chunk in range(first.chunks):
        first.stage(chunk)
    tensors = stream(filling, threads=2)
    assert len(list(itertools.islice(tensors, 3))) == 3
    before = threading.active_count()
    tensors.close()  # type: ignore[attr-defined]
    assert threading.active_count() < before


def test_a_file_that_turns_out_damaged_stops_the_whole_load(tmp_path: Path) -> None:
    content = dict(CONTENT)
    content["model-b.safetensors"] = b"<html>not here</html>" + bytes(500_000)
    with FillingSource(tmp_path, content, CHUNK) as source:
        source.files["model-a.safetensors"].stage(0)
        source.files["model-b.safetensors"].stage(0)
        with pytest.raises(CheckpointError, match=r"model-b\.safetensors is an HTML page"):
            load(source)


def test_a_load_to_a_device_during_staging_is_right(filling: FillingSource) -> None:
    order = filling.all_chunks()
    random.Random(1).shuffle(order)
    thread = filling.stage_in_background(order)
    with HostDevice() as device:
        loaded = load(filling, device, threads=2)
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == EXPECTED
    thread.join()
