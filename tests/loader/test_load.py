"""`load`: every tensor, bit for bit, whatever the dtype, the layout, the read path and the way it got there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import xxhash
from support.safetensors_files import Entry, entry, file_bytes, write_sharded

from headrace.cache.errors import MissingTensor, NotFound, UsageError
from headrace.cache.safetensors import DTYPE_BITS
from headrace.loader import DirectorySource, load, load_file
from headrace.loader.choose import ReadPath
from headrace.loader.memory import as_bytes

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct", "auto")
SHAPES: tuple[tuple[int, ...], ...] = ((), (4,), (0,), (3, 0, 2), (2, 3, 4), (1, 8), (4, 1000))
# F4 and F6 need a whole number of bytes.
EVERY = [
    entry(f"{dtype}.{'x'.join(map(str, shape))}", dtype, shape)
    for dtype in DTYPE_BITS
    for shape in SHAPES
    if not (DTYPE_BITS[dtype] < 8 and shape == ())
]


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().view(-1)
    return bytes(as_bytes(flat.view(torch.uint8))) if flat.numel() else b""


def expected_digest(entries: list[Entry]) -> str:
    """The definition, from the entries themselves."""
    state = xxhash.xxh3_128()
    for one in sorted(entries, key=lambda one: one.name):
        state.update(one.name.encode() + b"\0" + one.dtype.encode() + b"\0")
        state.update(",".join(str(size) for size in one.shape).encode() + b"\0" + one.data)
    return state.hexdigest()


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize("shift", [0, 1, 3, 4])
def test_every_dtype_and_shape_is_bit_equal_at_any_alignment(
    read_path: ReadPath, shift: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(EVERY, shift=shift))
    loaded = load(tmp_path, read_path=read_path)
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {e.name: e.data for e in EVERY}
    with safetensors.safe_open(path, "pt") as reference:
        assert list(loaded.tensors) == sorted(loaded.tensors, key=lambda name: loaded.infos[name].start)
        for one in EVERY:
            tensor = loaded.tensors[one.name]
            if one.dtype.startswith("F6_"):
                assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (len(one.data),))
                continue
            theirs = reference.get_tensor(one.name)
            assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
            assert bits(tensor) == bits(theirs)
            assert tensor.data_ptr() % max(1, tensor.dtype.itemsize) == 0
    assert loaded.digest() == expected_digest(EVERY)


@pytest.mark.parametrize("read_path", PATHS)
def test_neighbours_of_one_kind_are_tensors_of_their_own(read_path: ReadPath, tmp_path: Path) -> None:
    """They are cut from one view; autograd and changes in place must not notice."""
    neighbours = [entry(name, "F32", (rows, 3)) for name, rows in [("a", 2), ("b", 1), ("c", 4)]]
    other = [
        entry("d", "F32", ()),
        entry("e", "F32", ()),
        entry("f", "F32", (3, 4)),
        entry("g", "I32", (3, 4)),
    ]
    (tmp_path / "model.safetensors").write_bytes(file_bytes([*neighbours, *other]))
    tensors = load(tmp_path, read_path=read_path).tensors
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    assert before == {one.name: one.data for one in [*neighbours, *other]}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    weight = torch.ones(3, requires_grad=True)
    tensors["b"].mul_(weight).add_(1)
    assert tensors["b"].requires_grad
    assert not any(tensors[name].requires_grad for name in before if name != "b")
    assert {name: bits(tensors[name]) for name in before if name != "b"} == {
        name: value for name, value in before.items() if name != "b"
    }


def test_four_bit_tensors_that_torch_cannot_shape_come_as_bytes(tmp_path: Path) -> None:
    odd = entry("odd", "F4", (2, 3))
    (tmp_path / "model.safetensors").write_bytes(file_bytes([odd]))
    loaded = load(tmp_path)
    assert (loaded.tensors["odd"].dtype, bits(loaded.tensors["odd"])) == (torch.uint8, odd.data)
    assert loaded.infos["odd"].shape == (2, 3)
    assert loaded.digest() == expected_digest([odd])


SHARDS = {
    "model-00001-of-00003.safetensors": [entry("embed", "BF16", (50, 8)), entry("layer.0.w", "F32", (7,))],
    "model-00002-of-00003.safetensors": [entry("layer.1.w", "F32", (7, 9)), entry("layer.1.b", "F16", (3,))],
    "model-00003-of-00003.safetensors": [entry("head", "BF16", (8, 50))],
}
ALL = [one for entries in SHARDS.values() for one in entries]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", None])
def test_a_sharded_checkpoint_is_one_model(index: str | None, tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS, index)
    for read_path in PATHS:
        loaded = load(tmp_path, read_path=read_path)
        assert {name: bits(t) for name, t in loaded.tensors.items()} == {e.name: e.data for e in ALL}
        assert loaded.stats.files == 3
        assert loaded.stats.tensors == 5
        assert loaded.stats.bytes == sum(len(one.data) for one in ALL)


def test_the_digest_is_the_same_sharded_whole_reordered_and_by_any_read_path(tmp_path: Path) -> None:
    write_sharded(tmp_path / "sharded", SHARDS, "model.safetensors.index.json")
    write_sharded(tmp_path / "whole", {"model.safetensors": ALL[::-1]})
    digests = {
        load(tmp_path / form, read_path=path).digest() for form in ("sharded", "whole") for path in PATHS
    }
    assert digests == {expected_digest(ALL)}
    changed = [*ALL[:-1], ALL[-1]._replace(data=b"\x01" + ALL[-1].data[1:])]
    write_sharded(tmp_path / "changed", {"model.safetensors": changed})
    assert load(tmp_path / "changed").digest() == expected_digest(changed) != expected_digest(ALL)


@pytest.mark.parametrize("read_path", PATHS)
@pytest.mark.parametrize(
    ("names", "patterns", "chosen"),
    [
        (["head"], None, {"head"}),
        ("head", None, {"head"}),
        (None, ["layer.*"], {"layer.0.w", "layer.1.w", "layer.1.b"}),
        (["embed"], ["*.b"], {"embed", "layer.1.b"}),
        ([], None, set()),
    ],
)
def test_a_selection_loads_what_it_names_and_nothing_else(
    read_path: ReadPath, names: list[str] | None, patterns: list[str] | None, chosen: set[str], tmp_path: Path
) -> None:
    write_sharded(tmp_path, SHARDS, "model.safetensors.index.json")
    loaded = load(tmp_path, names=names, patterns=patterns, read_path=read_path)
    assert {name: bits(t) for name, t in loaded.tensors.items()} == {
        one.name: one.data for one in ALL if one.name in chosen
    }


def test_a_selection_opens_only_the_shards_it_needs(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS, "model.safetensors.index.json")
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"damaged, and not needed")
    assert list(load(tmp_path, patterns=["head"]).tensors) == ["head"]


def test_a_tensor_that_the_index_forgot_can_be_selected(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": [ALL[0]]}, "model.safetensors.index.json")
    (tmp_path / "a.safetensors").write_bytes(file_bytes(ALL[:2]))
    assert list(load(tmp_path, names=[ALL[1].name]).tensors) == [ALL[1].name]


def test_names_and_patterns_that_match_nothing_are_an_error_by_name(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS, "model.safetensors.index.json")
    with pytest.raises(MissingTensor) as caught:
        load(tmp_path, names=["head", "tail"], patterns=["layer.*", "vision.*"])
    assert caught.value.names == ("tail", "vision.*")


@pytest.mark.parametrize("read_path", PATHS)
def test_loaded_tensors_can_be_written_and_the_file_stays_as_it_was(
    read_path: ReadPath, tmp_path: Path
) -> None:
    write_sharded(tmp_path, SHARDS)
    path = tmp_path / "model-00001-of-00003.safetensors"
    before = path.read_bytes()
    load(tmp_path, read_path=read_path).tensors["embed"].fill_(1.5)
    assert path.read_bytes() == before
    assert bits(load(tmp_path, read_path=read_path).tensors["embed"]) == ALL[0].data


def test_buffered_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(ALL))
    loaded = load(path, read_path="buffered")
    path.write_bytes(b"")
    assert loaded.digest() == expected_digest(ALL)


def test_many_blocks_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    big = [entry("small", "U8", (5,)), entry("big", "BF16", (9, 1 << 20)), entry("rest", "F32", (1 << 18,))]
    (tmp_path / "model.safetensors").write_bytes(file_bytes(big))
    for threads in (1, 2, 7):
        for read_path in PATHS:
            assert load(tmp_path, threads=threads, read_path=read_path).digest() == expected_digest(big)


def test_a_single_file_an_index_and_a_source_can_be_given(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS, "model.safetensors.index.json")
    assert list(load(tmp_path / "model-00003-of-00003.safetensors").tensors) == ["head"]
    assert len(load(str(tmp_path / "model.safetensors.index.json")).tensors) == 5
    source = DirectorySource(tmp_path)
    assert load(source).digest() == load(source).digest() == expected_digest(ALL)


def test_files_behind_links_are_read_as_in_a_hub_cache(tmp_path: Path) -> None:
    write_sharded(tmp_path / "blobs", SHARDS, "model.safetensors.index.json")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert load(tmp_path / "snapshot").digest() == expected_digest(ALL)


def test_stats_tell_what_was_done_and_why(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    stats = load(tmp_path, read_path="auto").stats
    described = stats.as_json()
    assert set(described) == {
        "snapshot", "tensors", "bytes", "verified", "seconds", "gigabytes_per_second", "read_path", "trace", "explain",
    }  # fmt: skip
    assert described["snapshot"] is None
    assert len(stats.explain) == 3
    assert all(line.startswith("model-0000") for line in stats.explain)
    assert {"resolve", "header", "plan", "place"} <= {span.name for span in stats.trace}
    assert 0 < sum(span.seconds for span in stats.trace if span.name == "header") <= stats.seconds
    assert load(tmp_path, read_path="buffered").stats.read_path == "buffered"
    assert load(tmp_path, read_path="mapped").stats.read_path == "mapped"


def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    with pytest.raises(UsageError, match="read_path"):
        load(tmp_path, read_path="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads"):
        load(tmp_path, threads=0)
    with pytest.raises(UsageError, match="not supported"):
        load(tmp_path, "meta")
    with pytest.raises(UsageError, match="is not a device"):
        load(tmp_path, "gpu7")
    with pytest.raises(NotFound, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(NotFound, match="does not exist"):
        load("no/such/folder")


def test_loaded_files_are_closed(tmp_path: Path) -> None:
    write_sharded(tmp_path, SHARDS)
    script = (
        "import os, sys, headrace.loader as l\n"
        "count = lambda: len(os.listdir('/proc/self/fd'))\n"
        "before = count()\n"
        "for i in range(5): l.load(sys.argv[1], read_path='buffered'); list(l.stream(sys.argv[1]))\n"
        "print(count() - before)"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert answer.stdout.strip() == "0"


def test_load_file_and_load_agree(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(ALL))
    ours, theirs = load(path).tensors, load_file(path)
    assert list(ours) == list(theirs)
    assert all(bits(ours[name]) == bits(theirs[name]) for name in ours)
