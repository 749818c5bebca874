"""Slices: what a rank loads is what slicing the whole tensor gives, for every kind, dtype and shape."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import tempfile
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.filling_source import FillingSource
from support.host_device import HostDevice
from support.safetensors_files import Entry, entry, file_bytes, write_sharded
from support.sliced import bits_of, bytes_of, sliced
from support.tensors import bits

from headrace.cache.errors import LoadError, UsageError
from headrace.cache.safetensors import DTYPE_BITS, Header, read_header
from headrace.loader import Loaded, SlicePlan, load, stream
from headrace.loader.choose import ReadPath
from headrace.loader.gathering import Way, plan_slices
from headrace.loader.plan import Selection
from headrace.loader.readers import gather
from headrace.loader.slices import Experts, Fused, Part, Replicated, Rule, Shaped, Slicing, Split

PATHS: tuple[ReadPath, ...] = ("mapped", "buffered", "direct", "auto")


def expected(one: Entry, slicing: Slicing, rank: int, world: int) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of a slice."""
    part = sliced(bits_of(one.dtype, one.shape, one.data), slicing, rank, world)
    return part.shape[:-1], bytes_of(one.dtype, part)


def check(loaded: Loaded, entries: list[Entry], slicing: dict[str, Slicing], rank: int, world: int) -> None:
    assert list(loaded.tensors) == list(loaded.infos)
    assert set(loaded.tensors) == {one.name for one in entries}
    for one in entries:
        shape, data = expected(one, slicing.get(one.name, Replicated()), rank, world)
        info, tensor = loaded.infos[one.name], loaded.tensors[one.name]
        assert (info.shape, info.dtype, info.nbytes) == (shape, one.dtype, len(data))
        assert bits(tensor) == data
        assert tensor.is_contiguous()
        if DTYPE_BITS[one.dtype] >= 8:
            assert tuple(tensor.shape) == shape


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Entry, Slicing]:
    """(world, tensor, slicing that divides)."""
    world = draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
    # Whole bytes at every edge that can be cut, whatever the bits of an element.
    grain = {4: 2, 6: 4}.get(DTYPE_BITS[dtype], 1)
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    multiple = draw(st.sampled_from([1, 2, 3, 700]))
    shape[-1] *= grain
    kind = draw(st.sampled_from(["split", "heads", "uneven", "fused", "parts", "experts", "replicated"]))
    slicing: Slicing
    if kind == "experts":
        shape += [grain] if len(shape) == 1 else []
        shape[0] = world * draw(st.integers(1, 3))
        slicing = Experts(
            draw(st.sampled_from([None, shape[0]])), draw(st.sampled_from(["linear", "round_robin"]))
        )
    elif kind == "split":
        shape[dim] = world * multiple * grain
        slicing = Split(dim - draw(st.sampled_from([0, len(shape)])))
    elif kind == "uneven":
        shape[dim] = draw(st.integers(0, 40)) * (grain if dim == len(shape) - 1 else 1)
        if dim == len(shape) - 1 and grain > 1:
            shape[dim] = world * grain  # what does not divide is cut inside a byte
        slicing = Split(dim, uneven=True)
    elif kind == "heads":
        heads = draw(st.sampled_from([n for n in range(1, 4 * world) if n % world == 0 or world % n == 0]))
        shape[dim] = heads * multiple * grain
        slicing = Split(dim, heads=heads)
    elif kind == "fused":
        count = draw(st.integers(1, 3))
        shape[dim] = count * world * multiple * grain
        slicing = Fused(dim, count)
    elif kind == "parts":
        parts = []
        for _ in range(draw(st.integers(1, 3))):
            own = draw(st.sampled_from([None, 1, world, 2 * world]))
            parts.append(Part((own or world) * draw(st.integers(1, 3)) * multiple * grain, own))
        shape[dim] = sum(part.size for part in parts)
        slicing = Fused(dim, tuple(parts))
    else:
        slicing = Replicated()
    return world, entry("t", dtype, tuple(shape)), slicing


@settings(max_examples=300)
@given(cases(), st.integers(0, 4), st.sampled_from(PATHS), st.booleans())
def test_a_slice_is_what_slicing_the_whole_tensor_gives(
    case: tuple[int, Entry, Slicing], shift: int, read_path: ReadPath, on_device: bool
) -> None:
    world, one, slicing = case
    around = [entry("a", "U8", (17,)), one, entry("z", "BF16", (9, 2))]
    with tempfile.TemporaryDirectory() as folder, HostDevice() as device:
        (Path(folder) / "model.safetensors").write_bytes(file_bytes(around, shift=shift))
        for rank in range(world):
            plan = SlicePlan(rank, world, (Rule("t", slicing),))
            loaded = load(folder, device if on_device else "cpu", slices=plan, read_path=read_path, threads=2)
            check(loaded, around, {"t": slicing}, rank, world)
            got = dict(stream(folder, slices=plan, read_path=read_path, threads=2))
            assert {name: bits(tensor) for name, tensor in got.items()} == {
                name: bits(tensor) for name, tensor in loaded.tensors.items()
            }
            del loaded, got


# A slice for every way of gathering. More than 1024 teeth in one block of the second, more than one of the last.
BY_WAY: dict[Way, tuple[Entry, Slicing]] = {
    Way.WHOLE_ROWS: (entry("near", "BF16", (96, 3, 64)), Split(-1)),
    Way.MANY_TEETH: (entry("far", "F32", (2500, 4096)), Split(1)),
    Way.TOOTH_BY_TOOTH: (entry("wide", "U8", (60, 600_000)), Fused(1, (Part(400_000), Part(200_000)))),
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    shards = {f"{way.name.lower()}.safetensors": [one] for way, (one, _) in BY_WAY.items()}
    write_sharded(folder, shards, "model.safetensors.index.json")
    return folder


def wide_plan(rank: int, world: int) -> SlicePlan:
    return SlicePlan(rank, world, tuple(Rule(one.name, slicing) for one, slicing in BY_WAY.values()))


def test_the_examples_are_gathered_in_the_way_they_stand_for(wide_model: Path) -> None:
    for way, (one, _) in BY_WAY.items():
        header = header_of(wide_model / f"{way.name.lower()}.safetensors")
        ranges, gathered = plan_slices("m", header, Selection(), wide_plan(1, 4))
        assert (ranges.infos, gathered.ways) == ((), (way,))
        assert len(list(gathered.blocks())) > 1 or one.name == "near"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("cold", [False, True])
def test_every_way_of_gathering_gives_the_slice(world: int, cold: bool, wide_model: Path) -> None:
    entries = [one for one, _ in BY_WAY.values()]
    slicing = {one.name: how for one, how in BY_WAY.values()}
    for rank in range(world):
        if cold:
            drop_from_page_cache(wide_model)
        check(load(wide_model, slices=wide_plan(rank, world), threads=3), entries, slicing, rank, world)
        with HostDevice(delay=0.001) as device:
            check(
                load(wide_model, device, slices=wide_plan(rank, world), threads=3),
                entries,
                slicing,
                rank,
                world,
            )


def test_slices_are_gathered_where_copying_from_a_mapping_is_refused(
    wide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refused(*arguments: object) -> int:
        calls.append(arguments)
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(gather, "_copy_from_process", refused)
    one, slicing = BY_WAY[Way.MANY_TEETH]
    plan = SlicePlan(2, 4, (Rule("far", slicing),))
    check(load(wide_model, names=["far"], slices=plan, threads=1), [one], {"far": slicing}, 2, 4)
    assert len(calls) == 1  # and not tried again


@pytest.mark.parametrize("way", list(Way))
def test_a_file_that_becomes_shorter_is_an_error_while_slices_are_gathered(way: Way, tmp_path: Path) -> None:
    one, slicing = BY_WAY[way]
    content = file_bytes([one])
    with FillingSource(tmp_path / "source", {"model.safetensors": content}, 1 << 30) as source:
        file = source.files["model.safetensors"]
        file.stage(0)
        plan = SlicePlan(0, 2, (Rule("*", slicing),))
        (partial,) = (tmp_path / "source").iterdir()
        cut_off: list[int] = []

        def shorten() -> None:
            if len(cut_off) == 4:  # the header was read
                os.truncate(partial, len(content) // 3)
            cut_off.append(1)

        file.before_read = shorten
        with pytest.raises(LoadError, match=r"became shorter|changed while"):
            load(source, slices=plan, threads=2, read_path="buffered")


def test_slices_are_gathered_while_the_model_is_staged(tmp_path: Path, wide_model: Path) -> None:
    files = {path.name: path.read_bytes() for path in sorted(wide_model.iterdir())}
    entries = [one for one, _ in BY_WAY.values()]
    slicing = {one.name: how for one, how in BY_WAY.values()}
    with FillingSource(tmp_path / "source", files, 3_000_000) as source:
        order = source.all_chunks()
        random.Random(5).shuffle(order)
        thread = source.stage_in_background(order)
        try:
            check(load(source, slices=wide_plan(3, 4), threads=2), entries, slicing, 3, 4)
        finally:
            thread.join()


def test_slices_of_rows_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    one = entry("w", "F32", (64, 4096))
    (tmp_path / "model.safetensors").write_bytes(file_bytes([one]))
    loaded = load(tmp_path, read_path="mapped", slices=SlicePlan(3, 4, (Rule("w", Split(0)),)))
    assert loaded.stats.read_path == "mapped"
    assert (loaded.stats.bytes, bits(loaded.tensors["w"])) == (
        len(one.data) // 4,
        one.data[-len(one.data) // 4 :],
    )


def test_the_digest_of_slices_is_that_of_a_checkpoint_of_them(tmp_path: Path) -> None:
    entries = [entry("a", "BF16", (12, 10)), entry("b", "F32", (8,)), entry("c", "U8", (3, 8))]
    slicing: dict[str, Slicing] = {"a": Split(1), "b": Split(0)}
    rules = tuple(Rule(name, how) for name, how in slicing.items())
    write_sharded(tmp_path / "whole", {"model.safetensors": entries})
    digests = set()
    for rank in range(2):
        own = []
        for one in entries:
            shape, data = expected(one, slicing.get(one.name, Replicated()), rank, 2)
            own.append(Entry(one.name, one.dtype, shape, data))
        write_sharded(tmp_path / f"rank{rank}", {"model.safetensors": own})
        digest = load(tmp_path / "whole", slices=SlicePlan(rank, 2, rules)).digest()
        assert digest == load(tmp_path / f"rank{rank}").digest()
        digests.add(digest)
    assert len(digests) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here")
def test_slices_on_a_cuda_device_are_right(wide_model: Path) -> None:
    host = load(wide_model, slices=wide_plan(1, 4))
    loaded = load(wide_model, "cuda:0", slices=wide_plan(1, 4))
    assert all(tensor.is_cuda for tensor in loaded.tensors.values())
    assert loaded.digest() == host.digest()
    assert {
        name: bits(tensor.cpu()) for name, tensor in stream(wide_model, "cuda:0", slices=wide_plan(1, 4))
    } == {name: bits(tensor) for name, tensor in host.tensors.items()}


EXPERTS = [entry(f"layers.{layer}.experts.{n}.w", "F16", (2, 3)) for layer in range(2) for n in range(8)]


@pytest.mark.parametrize("order", ["linear", "round_robin"])
def test_ranks_share_the_experts_and_do_without_the_others(
    order: Literal["linear", "round_robin"], tmp_path: Path
) -> None:
    shards = {f"{n}.safetensors": EXPERTS[n::4] for n in range(4)} | {
        "r.safetensors": [entry("router", "F16", (8,))]
    }
    write_sharded(tmp_path, shards, "model.safetensors.index.json")
    seen: list[str] = []
    for rank in range(4):
        plan = SlicePlan(rank, 4, (Rule("layers.*", Experts(8, order)),))
        loaded = load(tmp_path, slices=plan)
        assert loaded.tensors.pop("router") is not None
        own = {int(name.split(".")[3]) for name in loaded.tensors}
        assert own == ({2 * rank, 2 * rank + 1} if order == "linear" else {rank, rank + 4})
        assert all(
            bits(loaded.tensors[one.name]) == one.data for one in EXPERTS if one.name in loaded.tensors
        )
        assert {name for name in (one.name for one in EXPERTS) if plan.needs(name)} == set(loaded.tensors)
        seen += loaded.tensors
    assert sorted(seen) == sorted(one.name for one in EXPERTS)


def test_stacked_and_single_experts_belong_to_the_same_ranks(tmp_path: Path) -> None:
    stacked = entry("layers.0.experts.up", "F16", (8, 5))
    write_sharded(tmp_path, {"model.safetensors": [stacked, *EXPERTS]})
    for order in ("linear", "round_robin"):
        for rank in range(4):
            loaded = load(tmp_path, slices=SlicePlan(rank, 4, (Rule("*", Experts(8, order)),)))
            own = sorted(int(name.split(".")[3]) for name in loaded.tensors if name.startswith("layers.1."))
            rows = [stacked.data[10 * number : 10 * (number + 1)] for number in own]
            assert bits(loaded.tensors[stacked.name]) == b"".join(rows)


def test_fewer_key_and_value_heads_than_ranks_are_replicated(tmp_path: Path) -> None:
    # 4 query heads, 2 key and value heads, 3 rows each; every row holds its own number.
    rows = torch.arange(24, dtype=torch.int32).view(24, 1).expand(24, 5).contiguous()
    fused = Entry("qkv.weight", "I32", (24, 5), bits(rows))
    keys = Entry("k.weight", "I32", (6, 5), bits(rows[12:18]))
    write_sharded(tmp_path, {"model.safetensors": [fused, keys]})
    rules = (Rule("qkv.*", Fused.qkv(heads=4, kv_heads=2, head_size=3)), Rule("k.*", Split(0, heads=2)))
    for rank in range(4):
        loaded = load(tmp_path, slices=SlicePlan(rank, 4, rules))
        query, key, value = 3 * rank, 12 + 3 * (rank // 2), 18 + 3 * (rank // 2)
        first = [*range(query, query + 3), *range(key, key + 3), *range(value, value + 3)]
        assert loaded.tensors["qkv.weight"][:, 4].tolist() == first
        assert loaded.tensors["k.weight"][:, 0].tolist() == [*range(key, key + 3)]
    for rank in range(2):
        loaded = load(tmp_path, slices=SlicePlan(rank, 2, rules))
        assert loaded.tensors["k.weight"][:, 0].tolist() == [*range(12 + 3 * rank, 15 + 3 * rank)]
    with pytest.raises(UsageError, match="2 heads, of which 3 ranks cannot have equal shares"):
        load(tmp_path, slices=SlicePlan(0, 3, rules[1:]))


def test_the_first_rule_that_fits_decides(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"m.safetensors": [entry("a.w", "U8", (4, 4)), entry("b.w", "U8", (4, 4))]})
    plan = SlicePlan(0, 2, (Rule("a.*", Split(0)), Rule("*.w", Split(1))))
    loaded = load(tmp_path, slices=plan)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.tensors.items()} == {
        "a.w": (2, 4),
        "b.w": (4, 2),
    }


def test_selections_and_slices_go_together(tmp_path: Path) -> None:
    entries = [entry(f"{name}.w", "U8", (4, 6)) for name in "abc"]
    write_sharded(tmp_path, {"m.safetensors": entries})
    plan = SlicePlan(1, 2, (Rule("a.*", Split(1)), Rule("b.*", Split(0))))
    loaded = load(tmp_path, names=["c.w"], patterns=["a.*"], slices=plan)
    check(loaded, [entries[0], entries[2]], {"a.w": Split(1)}, 1, 2)


ERRORS: list[tuple[str, str, tuple[int, ...], Slicing]] = [
    ("5 does not divide by 2 ranks", "U8", (5, 4), Split(0)),
    ("6 does not divide by 4 heads", "U8", (4, 6), Split(1, heads=4)),
    ("has 3 heads, which do not divide by 2 ranks", "U8", (6, 2), Split(0, heads=3)),
    ("has no dimension 2", "U8", (4, 4), Split(2)),
    ("has no dimension -3", "U8", (4, 4), Split(-3)),
    ("has no dimension 0", "F32", (), Split(0)),
    ("F4 have 4 bits, and the cut would go through a byte", "F4", (4, 2), Split(1)),
    ("F6_E2M3 have 6 bits, and the cut would go through a byte", "F6_E2M3", (2, 4), Split(1)),
    ("does not consist of 3 equal parts", "U8", (8, 2), Fused(0, 3)),
    ("parts of its slicing rule add up to 7", "U8", (8, 2), Fused(0, (Part(4), Part(3)))),
    ("3 does not divide by 2 ranks", "U8", (6, 2), Fused(0, 2)),
    ("3 experts do not divide by 2 ranks", "U8", (3, 2), Experts()),
    ("does not stack 4 experts", "U8", (6, 2), Experts(4)),
    ("no dimension along which experts", "U8", (), Experts()),
]


@pytest.mark.parametrize(("message", "dtype", "shape", "slicing"), ERRORS)
def test_what_cannot_be_sliced_is_refused_by_name(
    message: str, dtype: str, shape: tuple[int, ...], slicing: Slicing, tmp_path: Path
) -> None:
    write_sharded(tmp_path, {"m.safetensors": [entry("the.tensor", dtype, shape)]})
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, slices=SlicePlan(0, 2, (Rule("the.*", slicing),)))
    assert "'the.tensor'" in str(caught.value)


def test_experts_that_cannot_be_counted_are_refused() -> None:
    name = "layers.0.experts.7.w"
    with pytest.raises(UsageError, match="how many experts"):
        SlicePlan(0, 2, (Rule("*", Experts()),)).needs(name)
    with pytest.raises(UsageError, match=r"is of expert 7, but the slicing rule counts 4"):
        SlicePlan(0, 2, (Rule("*", Experts(4)),)).needs(name)


@pytest.mark.parametrize(
    ("message", "rank", "world", "rules"),
    [
        ("rank 2 is not one of 0 to 1", 2, 2, ()),
        ("rank -1 is not one of 0 to 1", -1, 2, ()),
        ("world must be at least 1", 0, 0, ()),
        ("size or count below 1", 0, 1, (Rule("a", Split(0, heads=0)),)),
        ("size or count below 1", 0, 1, (Rule("a", Fused(0, ())),)),
        ("size or count below 1", 0, 1, (Rule("a", Shaped(Split(0), Fused(0, (Part(-1),)))),)),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(
    message: str, rank: int, world: int, rules: tuple[Rule, ...]
) -> None:
    with pytest.raises(UsageError, match=message):
        SlicePlan(rank, world, rules)


def test_a_rule_that_fits_nothing_and_a_tensor_without_a_rule_are_errors_if_so_chosen(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"m.safetensors": [entry("a", "U8", (4,)), entry("b", "U8", (4,))]})
    rules = (Rule("a", Split(0)), Rule("q_proj.*", Split(0)))
    with pytest.raises(UsageError, match=r"no tensor that fits the slicing rule 'q_proj\.\*'"):
        load(tmp_path, slices=SlicePlan(0, 2, rules))
    assert load(tmp_path, slices=SlicePlan(0, 2, rules, strict=False)).tensors["a"].shape == (2,)
    with pytest.raises(UsageError, match="fits any of the 1 slicing rules"):
        load(tmp_path, slices=SlicePlan(0, 2, rules[1:], strict=False))
    with pytest.raises(UsageError, match="no slicing rule fits tensor 'b'"):
        load(tmp_path, slices=SlicePlan(0, 2, rules[:1], unmatched="error"))


def header_of(path: Path) -> Header:
    with open(path, "rb") as file:
        return read_header(file.fileno(), str(path))


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
