"""Connections grow while throughput grows, and no further."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.growth import ConnectionGrowth


def settle(growth: ConnectionGrowth, capacity: int, samples: int = 10) -> int:
    """The target after some samples of a path on which `capacity` connections are as fast as any number."""
    for _ in range(samples):
        growth.observe(1e8 * min(growth.target, capacity))
    return growth.target


@pytest.mark.parametrize(("capacity", "target"), [(2, 8), (8, 8), (16, 16), (32, 32), (1000, 32)])
def test_it_settles_where_more_gains_nothing(capacity: int, target: int) -> None:
    assert settle(ConnectionGrowth(limit=32), capacity) == target


def test_it_tries_again_after_a_rest() -> None:
    growth = ConnectionGrowth(limit=64, rest=3)
    assert settle(growth, 8, samples=2) == 8
    for _ in range(3):
        growth.observe(8e8)
    assert growth.target == 16  # the path may have become faster
    growth.observe(16e8)
    assert growth.target == 32


def test_a_small_limit_is_kept_from_the_start() -> None:
    assert ConnectionGrowth(limit=3).target == 3


@given(st.integers(1, 64), st.lists(st.floats(0, 1e10), max_size=100))
def test_the_target_stays_within_its_bounds_whatever_the_rates(limit: int, rates: list[float]) -> None:
    growth = ConnectionGrowth(limit=limit)
    for rate in rates:
        assert 1 <= growth.observe(rate) <= limit
