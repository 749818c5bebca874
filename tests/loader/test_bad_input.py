"""What files may do to a load: never end the process, never hand out wrong tensors, never leave memory behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.host_device import HostDevice
from support.safetensors_files import Entry, entry, file_bytes, raw_file, write_sharded
from support.tensors import bits

from headrace.cache.errors import CheckpointError, LoadError, MissingTensor
from headrace.loader import load, stream
from headrace.loader.choose import ReadPath

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct", "auto")
INDEX = "model.safetensors.index.json"

_PRELUDE = """
import contextlib, os, random, sys, threading, time
from pathlib import Path
from headrace.cache.errors import HeadraceError
from headrace.loader import drop_in, load, load_file, safe_open, stream
from headrace.loader.readers.reader import FileReader
from support.safetensors_files import entry, file_bytes
folder = Path(sys.argv[1])
path = folder / "model.safetensors"
# At an odd place, no tensor can be a view of the file.
contents = [file_bytes([entry(f"t{i}", "F32", (300_000,)) for i in range(6)], shift=n) for n in (0, 3)]
"""

_AT_RANDOM = """
def get_one_by_one(source, **_):
    with safe_open(source, "pt") as opened:
        return [opened.get_tensor(name) for name in opened.keys()]

ways = {
    "load": load,
    "stream": lambda source, **how: list(stream(source, **how)),
    "load_file": lambda source, **_: load_file(source),
    "get_tensor": get_one_by_one,
}

def truncated():
    os.truncate(path, choose.randrange(len(content)))

def grown():
    with open(path, "ab") as file:
        file.write(bytes(choose.randrange(1, 100_000)))

def replaced():
    other = folder / "other"
    other.write_bytes(contents[0][: choose.randrange(len(content))])
    other.replace(path)

def emptied_and_written_again():
    os.truncate(path, 0)
    path.write_bytes(content)

choose = random.Random(7)
longest = 0.01
for act in (truncated, grown, replaced, emptied_and_written_again):
    good, failed = 0, 0
    for number in range(40):
        content = choose.choice(contents)
        path.write_bytes(content)
        way = list(ways)[number % 4]
        read_path = ("mapped", "buffered", "direct", "auto")[number // 4 % 4]
        pause = choose.random() * longest

        def later():
            time.sleep(pause)
            act()

        thread = threading.Thread(target=later)
        thread.start()
        began = time.perf_counter()
        try:
            ways[way](path, **({"read_path": read_path, "threads": 2} if way in ("load", "stream") else {}))
            good += 1
        except HeadraceError as error:
            failed += 1
        except FileNotFoundError:
            failed += 1
        longest = max(longest, min(0.1, time.perf_counter() - began))
        thread.join()
    print(act.__name__, good, failed)
"""

_LATE = """
take_all, populate = FileReader.take_all, drop_in.populate

def take(reader):
    os.truncate(path, 5000)
    return take_all(reader)

def populated(image, start, stop, what):
    populate(image, start, stop, what)
    os.truncate(path, 5000)

FileReader.take_all, drop_in.populate = take, populated
for number, content in enumerate(contents):
    for name, way in (("load", lambda: load(path, read_path="mapped")), ("load_file", lambda: load_file(path))):
        path.write_bytes(content)
        try:
            way()
            print(number, name, "loaded")
        except HeadraceError as error:
            print(number, name, type(error).__name__, "became shorter" in str(error))
"""


def in_a_process(code: str, folder: Path) -> list[str]:
    """Its lines; it must end by itself, and not by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + code, str(folder)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    return done.stdout.splitlines()


def test_no_change_of_a_file_at_any_moment_of_a_load_ends_the_process(tmp_path: Path) -> None:
    results = {
        name: (int(good), int(bad)) for name, good, bad in map(str.split, in_a_process(_AT_RANDOM, tmp_path))
    }
    assert set(results) == {"truncated", "grown", "replaced", "emptied_and_written_again"}
    assert all(good + bad == 40 for good, bad in results.values())
    assert results["truncated"][1] > 0


def test_a_file_truncated_when_its_pages_were_already_in_memory_is_no_signal(tmp_path: Path) -> None:
    """Tensors that cannot be views are copied after everything was read; the others are not touched."""
    assert in_a_process(_LATE, tmp_path) == [
        "0 load loaded",
        "0 load_file loaded",
        "1 load LoadError True",
        "1 load_file LoadError True",
    ]


@pytest.mark.parametrize("read_path", PATHS)
def test_a_header_in_another_order_than_its_bytes_is_read_right(read_path: ReadPath, tmp_path: Path) -> None:
    entries = [entry(f"t{number}", "I16", (1000 + number,)) for number in range(5)]
    content = file_bytes(entries)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    shuffled = {name: header[name] for name in ("t3", "t0", "t4", "t2", "t1")}
    (tmp_path / "m.safetensors").write_bytes(raw_file(json.dumps(shuffled).encode(), content[8 + length :]))
    loaded = load(tmp_path, read_path=read_path)
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
        e.name: e.data for e in entries
    }
    assert list(loaded.tensors) == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 8), (4, 12)), "overlaps another tensor"),
        (((0, 8), (0, 8)), "overlaps another tensor"),
        (((0, 8), (12, 20)), "leaves a hole of 4 bytes"),
        (((4, 12), (12, 20)), "leaves a hole of 4 bytes"),
        (((0, 8), (8, 1 << 40)), "shape and dtype need 8 bytes"),
    ],
)
def test_tensors_that_do_not_lie_one_after_another_are_refused_before_anything_is_handed_out(
    places: tuple[tuple[int, int], ...], message: str, read_path: ReadPath, tmp_path: Path
) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_bytes([entry("first", "U8", (8,))]))
    header = {
        f"t{number}": {"dtype": "U8", "shape": [8], "data_offsets": list(place)}
        for number, place in enumerate(places)
    }
    (tmp_path / "b.safetensors").write_bytes(raw_file(json.dumps(header).encode(), bytes(20)))
    with pytest.raises(CheckpointError, match=rf"b\.safetensors has a damaged header: .*{message}"):
        load(tmp_path, read_path=read_path)
    with pytest.raises(CheckpointError, match=message):
        for name, _ in stream(tmp_path, read_path=read_path):
            assert name == "first"


@pytest.mark.parametrize("names", [None, ["a"], ["c"]])
def test_an_index_that_places_a_tensor_in_another_shard_than_has_it_is_refused(
    names: list[str] | None, tmp_path: Path
) -> None:
    a, b, c = (entry(name, "F32", (3,)) for name in "abc")
    write_sharded(tmp_path, {"x-1.safetensors": [a, c], "x-2.safetensors": [b]}, INDEX)
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    if names == ["a"]:  # the shard that disagrees is not opened
        assert list(load(tmp_path, names=names).tensors) == ["a"]
        return
    for read in (load, lambda *args, **how: list(stream(*args, **how))):
        with pytest.raises(MissingTensor, match=r"x-2\.safetensors .* lacks c") as caught:
            read(tmp_path, names=names)
        assert caught.value.names == ("c",)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_device_out_of_memory_midway_leaves_nothing_behind(
    threads: int, streaming: bool, tmp_path: Path
) -> None:
    for shard in range(4):
        entries = [Entry(f"{shard}.{n}", "U8", (1 << 20,), bytes([n]) * (1 << 20)) for n in range(3)]
        (tmp_path / f"{shard}.safetensors").write_bytes(file_bytes(entries))
    before = set(threading.enumerate())
    with HostDevice(room=7 << 20, delay=0.001) as device:  # two of the four
        inside = set(threading.enumerate())
        got: dict[str, torch.Tensor] = {}
        try:
            if streaming:
                got.update(stream(tmp_path, device, threads=threads))
            else:
                load(tmp_path, device, threads=threads)
            raise AssertionError("everything fitted")
        except LoadError as error:
            assert "no room for" in str(error)
        got.clear()
        gc.collect()
        assert device.slab_bytes == 0
        assert device.live_buffers == 0
        assert set(threading.enumerate()) == inside
        # And the device is as good as before.
        room = load(tmp_path / "3.safetensors", device, threads=threads)
        assert all(
            bits(tensor) == bytes([int(name[2:])]) * (1 << 20) for name, tensor in room.tensors.items()
        )
        del room
    assert set(threading.enumerate()) == before


def test_a_stream_that_fails_on_a_device_gave_only_right_tensors(tmp_path: Path) -> None:
    entries = [Entry(f"t{n}", "U8", (1 << 20,), bytes([n]) * (1 << 20)) for n in range(6)]
    for number, one in enumerate(entries):
        (tmp_path / f"{number}.safetensors").write_bytes(file_bytes([one]))
    got = {}
    with HostDevice(room=4 << 20, delay=0.001) as device:
        with pytest.raises(LoadError, match="no room for"):
            for name, tensor in stream(tmp_path, device, threads=2):
                got[name] = tensor  # kept: nothing is freed
        assert 0 < len(got) <= 4
        assert all(bits(tensor) == bytes([int(name[1:])]) * (1 << 20) for name, tensor in got.items())
        got.clear()
        del tensor
        gc.collect()
        assert device.slab_bytes == 0
