"""What is read for a selection: all of it, in order, and not much more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.safetensors import Header, TensorInfo
from headrace.loader.plan import BLOCK, MAX_GAP, PAGE, FilePlan, Selection, plan_file


def header(sizes: list[int], data_start: int = 1000) -> Header:
    tensors = {}
    position = 0
    for number, size in enumerate(sizes):
        tensors[f"t{number}"] = TensorInfo(f"t{number}", "U8", (size,), position, position + size)
        position += size
    return Header(tensors, None, data_start, data_start + position)


def check(plan: FilePlan, granularity: int) -> None:
    """Every tensor lies within blocks that are in order and at most `BLOCK` long, and where it should."""
    blocks = list(plan.blocks(granularity))
    assert all(0 < block.stop - block.start <= BLOCK for block in blocks)
    assert all(block.start // BLOCK == (block.stop - 1) // BLOCK for block in blocks)
    assert [block.start for block in blocks] == sorted(block.start for block in blocks)
    for block in blocks:
        assert block.start % granularity == 0
        assert block.stop % granularity == 0 or block.stop == plan.header.file_size
    for segment in plan.segments:
        inside = [b for b in blocks if plan.segments[b.segment] == segment]
        assert inside[0].start <= segment.start
        assert inside[-1].stop >= segment.stop
        assert segment.start % PAGE == segment.offset % PAGE
        assert segment.offset + segment.stop - segment.start <= plan.images[segment.image]
        if granularity == 1:
            assert sum(b.stop - b.start for b in inside) == segment.stop - segment.start
    for info, image, offset in zip(plan.infos, plan.image_of, plan.offset_of, strict=True):
        start = plan.header.data_start + info.start
        if not info.nbytes:
            continue
        (home,) = [s for s in plan.segments if s.start <= start and start + info.nbytes <= s.stop]
        assert (image, offset) == (home.image, home.offset + start - home.start)
    ends = sorted((s.image, s.offset, s.offset + s.stop - s.start) for s in plan.segments)
    for (image, _, stop), (other, start, _) in itertools.pairwise(ends):
        assert image != other or stop <= start


SIZES = st.lists(
    st.sampled_from([0, 1, 100, 4096, MAX_GAP, MAX_GAP + 1, 200_000, BLOCK, 3 * BLOCK + 17]),
    min_size=1,
    max_size=25,
)


@settings(deadline=None)
@given(SIZES, st.data(), st.integers(10, 10_000), st.sampled_from([None, 1, 1 << 20, 64 << 20]))
def test_a_plan_covers_what_was_selected_and_reads_over_a_bounded_rest(
    sizes: list[int], data: st.DataObject, data_start: int, max_image: int | None
) -> None:
    names = data.draw(st.sets(st.sampled_from([f"t{n}" for n in range(len(sizes))])))
    plan = plan_file("m", header(sizes, data_start), Selection.of(names), max_image=max_image)
    assert {info.name for info in plan.infos} == names
    for granularity in (1, 4096):
        check(plan, granularity)
    assert plan.read_bytes - plan.tensor_bytes <= max(1 << 20, plan.tensor_bytes // 8)


@settings(deadline=None)
@given(SIZES, st.integers(10, 10_000))
def test_a_whole_file_is_one_segment_in_one_image_and_nothing_more(sizes: list[int], data_start: int) -> None:
    plan = plan_file("m", header(sizes, data_start), Selection())
    check(plan, 1)
    assert plan.read_bytes == plan.tensor_bytes == sum(sizes)
    assert len(plan.images) == len(plan.segments) == (1 if sum(sizes) else 0)


def test_images_are_limited_but_never_cut_a_tensor() -> None:
    plan = plan_file(
        "m", header([600_000, 300_000, 300_000, 5_000_000, 10]), Selection(), max_image=1_000_000
    )
    check(plan, 1)
    assert list(plan.image_of) == [0, 0, 1, 2, 3]


def test_near_neighbours_are_joined_and_far_ones_are_not() -> None:
    near = plan_file("m", header([10, MAX_GAP, 10]), Selection.of(["t0", "t2"]))
    far = plan_file("m", header([10, MAX_GAP + 1, 10]), Selection.of(["t0", "t2"]))
    assert (len(near.segments), len(far.segments)) == (1, 2)
    assert far.read_bytes == 20


@pytest.mark.parametrize(
    ("selection", "taken"),
    [
        (Selection.of(), {"a.b", "A.b", "a[0]"}),
        (Selection.of(names=["a.b"]), {"a.b"}),
        (Selection.of(patterns=["a.*"]), {"a.b"}),
        (Selection.of(names="a[0]", patterns="A*"), {"A.b", "a[0]"}),
        (Selection.of(patterns=[]), set()),
    ],
)
def test_names_are_exact_and_patterns_respect_case(selection: Selection, taken: set[str]) -> None:
    assert {name for name in ("a.b", "A.b", "a[0]") if selection.takes(name)} == taken
