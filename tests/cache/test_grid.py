"""The grid covers every byte once, and follows tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.errors import ManifestError, UsageError
from headrace.cache.grid import ALONE, Grid, by_tensors, check_chunk_size, fixed

CHUNK = 1 << 20
_tensor_sizes = st.lists(st.one_of(st.integers(0, 4096), st.integers(0, 5 * CHUNK)), max_size=30)


def spans_of(data_start: int, sizes: list[int]) -> list[tuple[int, int]]:
    spans, at = [], data_start
    for size in sizes:
        spans.append((at, at + size))
        at += size
    return spans


@given(st.integers(0, 1 << 40), st.integers(1 << 16, 1 << 28))
def test_a_fixed_grid_covers_the_file_with_chunks_no_larger_than_asked(size: int, chunk: int) -> None:
    if size // chunk > 10_000:
        size = chunk * 10_000
    grid = fixed(size, chunk)
    assert grid.size == size
    assert all(0 < n <= chunk for n in grid.lengths)


@given(st.integers(9, 3 * CHUNK), _tensor_sizes)
def test_a_tensor_grid_covers_the_file_and_cuts_at_the_header_and_at_large_tensors(
    data_start: int, sizes: list[int]
) -> None:
    spans = spans_of(data_start, sizes)
    size = data_start + sum(sizes)
    grid = by_tensors(size, data_start, spans, CHUNK)
    assert grid.size == size
    assert all(0 < n <= CHUNK for n in grid.lengths)
    cuts = set(grid.offsets)
    assert data_start in cuts
    for start, stop in spans:
        if stop - start >= CHUNK // ALONE:
            assert {start, stop} <= cuts
    # No tensor smaller than a chunk is torn.
    for start, stop in spans:
        if stop - start < CHUNK // ALONE:
            assert not any(start < cut < stop for cut in cuts)


@given(st.integers(9, 4096), st.integers(9, 4096), _tensor_sizes)
def test_a_longer_header_shifts_no_chunk_of_the_data(one: int, other: int, sizes: list[int]) -> None:
    def data_lengths(start: int) -> tuple[int, ...]:
        grid = by_tensors(start + sum(sizes), start, spans_of(start, sizes), CHUNK)
        return grid.lengths[grid.offsets.index(start) :]

    assert data_lengths(one) == data_lengths(other)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.data())
def test_covering_names_exactly_the_chunks_that_a_range_touches(
    lengths: list[int], data: st.DataObject
) -> None:
    grid = Grid(tuple(lengths))
    start = data.draw(st.integers(0, grid.size - 1))
    stop = data.draw(st.integers(start + 1, grid.size))
    first, last = grid.covering(start, stop)
    touched = [i for i in range(len(grid)) if grid.offsets[i] < stop and grid.offsets[i + 1] > start]
    assert list(range(first, last)) == touched
    assert grid.covering(start, start) == (0, 0)


@given(st.lists(st.sampled_from([1, 7, 4096]), max_size=40))
def test_the_run_length_form_round_trips(lengths: list[int]) -> None:
    grid = Grid(tuple(lengths))
    assert Grid.from_runs(grid.runs(), "here") == grid


@pytest.mark.parametrize(
    "runs", [None, {}, [1], [[1]], [[0, 1]], [[1, -1]], [[1, True]], [["1", 1]], [[1 << 40, 1]]]
)
def test_malformed_chunk_lengths_are_refused(runs: object) -> None:
    with pytest.raises(ManifestError, match="here"):
        Grid.from_runs(runs, "here")


def test_absurdly_many_chunks_are_refused_before_they_are_made() -> None:
    with pytest.raises(ManifestError, match="beyond all limits"):
        Grid.from_runs([[1, 1 << 60]], "here")


@pytest.mark.parametrize("size", [0, 1000, 1 << 30])
def test_chunk_sizes_out_of_bounds_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match="64 KiB to 256 MiB"):
        check_chunk_size(size)
