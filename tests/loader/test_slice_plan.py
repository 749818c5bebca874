"""What is read for slices: little more than they need, and by all ranks together everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_headers import headers, llama_shapes

from headrace.cache.safetensors import Header, TensorInfo
from headrace.loader.cuts import Comb, Cut, cut
from headrace.loader.gathering import MAX_SPAN, GatherPlan, Way, plan_slices, way_of
from headrace.loader.plan import BLOCK, PAGE, FilePlan, Selection
from headrace.loader.slices import Fused, Part, Rule, SlicePlan, Split
from headrace.loader.tp_plan import slices_from_tp_plan

# base_model_tp_plan of transformers' LlamaConfig, and _tp_plan of LlamaForCausalLM (5.23).
LLAMA = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


def needed(header: Header, slices: SlicePlan) -> Iterator[Cut]:
    for info in header.tensors.values():
        one = slices.cut(info)
        if one is not None:
            yield one


def teeth(one: Cut, whole: TensorInfo) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(pitch, [start, stop) of each tooth in a row) of a slice; a range is one row's tooth."""
    if one.comb is None:
        return whole.nbytes, ((one.info.start - whole.start, one.info.stop - whole.start),)
    assert one.comb.start == whole.start and one.comb.rows * one.comb.pitch == whole.nbytes
    return one.comb.pitch, tuple((start, start + width) for start, width in one.comb.teeth)


def check_plans(ranges: FilePlan, gathered: GatherPlan, cuts: list[Cut]) -> None:
    """Every byte that is needed lies in a segment or is gathered, and blocks are bounded."""
    data_start = ranges.header.data_start
    assert list(ranges.infos) == [one.info for one in cuts if one.comb is None]
    assert list(gathered.infos) == [one.info for one in cuts if one.comb is not None]
    for info in ranges.infos:
        start, stop = data_start + info.start, data_start + info.stop
        assert start == stop or any(one.start <= start and stop <= one.stop for one in ranges.segments)
    blocks = list(gathered.blocks())
    for number, comb in enumerate(gathered.combs):
        own = [block for block in blocks if block.segment == number]
        edges = [(block.first, block.last) for block in own]
        assert edges[0][0] == 0 and edges[-1][1] == comb.nbytes
        assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
        for block in own:
            assert block.last - block.first <= BLOCK
            assert block.stop - block.start <= max(MAX_SPAN, comb.pitch, BLOCK)
            assert data_start + comb.locate(block.first) == block.start
            assert data_start + comb.locate(block.last - 1) == block.stop - 1


@pytest.mark.parametrize("world", [2, 8, 16])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_ranks_of_a_llama_70b_read_what_they_need_and_together_everything(world: int, dtype: str) -> None:
    files = list(headers(llama_shapes(), dtype))
    assert len(files) > 10
    plans = [slices_from_tp_plan(LLAMA, rank, world, kv_heads=8) for rank in range(world)]
    read, wanted = [0] * world, [0] * world
    for header in files:
        by_rank = [list(needed(header, slices)) for slices in plans]
        for rank, slices in enumerate(plans):
            ranges, gathered = plan_slices("m", header, Selection(), slices)
            check_plans(ranges, gathered, by_rank[rank])
            assert set(gathered.ways) <= {Way.MANY_TEETH, Way.TOOTH_BY_TOOTH}
            read[rank] += ranges.read_bytes + gathered.read_bytes
            wanted[rank] += sum(one.info.nbytes for one in by_rank[rank])
        for whole, cuts in zip(header.tensors.values(), zip(*by_rank, strict=True), strict=True):
            covered: set[tuple[int, int]] = set()
            for one in cuts:
                assert one.info.name == whole.name
                pitch, spans = teeth(one, whole)
                covered.update(spans)
            edges = sorted(covered)
            assert edges[0][0] == 0 and edges[-1][1] == pitch
            assert all(before[1] >= after[0] for before, after in itertools.pairwise(edges))
    for rank in range(world):
        assert wanted[rank] <= read[rank] <= 1.02 * wanted[rank]
    # All that is in more than one rank: keys and values of grouped heads, and the norms.
    total = sum(header.file_size - header.data_start for header in files)
    keys_and_values = 2 * 80 * 1024 * 8192 * (2 if dtype == "BF16" else 1)
    norms = (2 * 80 + 1) * 8192 * (2 if dtype == "BF16" else 1)
    assert sum(wanted) == total + max(0, world // 8 - 1) * keys_and_values + (world - 1) * norms


def test_rows_of_narrow_parts_are_read_whole_and_others_are_not() -> None:
    def way(rows: int, *widths_and_gaps: int) -> Way:
        """Teeth and gaps in turn make a row."""
        edges = list(itertools.accumulate(widths_and_gaps, initial=0))
        teeth = tuple((start, stop - start) for start, stop in itertools.pairwise(edges))[::2]
        return way_of(Comb(0, rows, edges[-1], teeth))

    assert way(100, 64, 64) is Way.WHOLE_ROWS
    assert way(100, 64, PAGE - 1) is Way.WHOLE_ROWS
    assert way(100, 64, PAGE) is Way.MANY_TEETH
    assert way(100, 64, 64, 64, 2 * PAGE) is Way.MANY_TEETH
    assert way(100, 64, 2 * PAGE - 100, 64, 90) is Way.WHOLE_ROWS
    assert way(100, 65536, 64) is Way.TOOTH_BY_TOOTH
    assert way(1, 1 << 30, 64, 1 << 30, 64) is Way.TOOTH_BY_TOOTH


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    edges=st.lists(st.integers(0, 6), max_size=6),
    data=st.data(),
)
def test_the_ranges_of_a_cut_are_its_bytes_in_order(
    shape: list[int], edges: list[int], data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    points = sorted(min(edge, shape[dim]) for edge in edges)
    spans = list(zip(points[::2], points[1::2], strict=False))
    count = 1
    for size in shape:
        count *= size
    info = TensorInfo("t", "U8", tuple(shape), 100, 100 + count)
    one = cut(info, dim, spans)
    inner = count
    for size in shape[: dim + 1]:
        inner //= size
    expected = [
        100 + position
        for position in range(count)
        if any(start <= position // inner % shape[dim] < stop for start, stop in spans)
    ]
    ranges = list(one.ranges())
    assert [byte for start, stop in ranges for byte in range(start, stop)] == expected
    assert one.info.nbytes == len(expected)
    assert one.info.shape == (*shape[:dim], sum(stop - start for start, stop in spans), *shape[dim + 1 :])
    if one.comb is not None:
        assert [one.comb.locate(position) for position in range(one.comb.nbytes)] == [
            at - 0 for at in expected
        ]
        first = data.draw(st.integers(0, one.comb.nbytes))
        last = data.draw(st.integers(first, one.comb.nbytes))
        part = [byte for start, stop in one.comb.pieces(first, last) for byte in range(start, stop)]
        assert part == expected[first:last]


def test_a_fused_tensor_of_many_gigabytes_is_cut_into_blocks_within_its_parts() -> None:
    header = next(headers({"fused": (3 * 40_000, 8192)}))
    slices = SlicePlan(1, 2, (Rule("fused", Fused(0, (Part(80_000), Part(40_000)))),))
    ranges, gathered = plan_slices("m", header, Selection(), slices)
    check_plans(ranges, gathered, list(needed(header, slices)))
    assert (gathered.ways, gathered.read_bytes) == (
        (Way.TOOTH_BY_TOOTH,),
        header.tensors["fused"].nbytes // 2,
    )


def test_streamed_images_are_limited_but_never_cut_a_slice() -> None:
    header = next(headers({f"t{number}": (1000, 1000) for number in range(5)}))
    slices = SlicePlan(0, 2, (Rule("*", Split(1)),))
    _, gathered = plan_slices("m", header, Selection(), slices, max_image=2_500_000)
    assert list(gathered.image_of) == [0, 0, 1, 1, 2]
    assert all(offset % 64 == 0 for offset in gathered.offset_of)
    assert max(gathered.images) <= 2_500_000
