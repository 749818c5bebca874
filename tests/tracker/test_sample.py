"""Which holders a node is told of."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.tracker.protocol import MAX_HOLDERS
from headrace.cache.tracker.sample import NEAR, sample

WIDTHS = st.sampled_from([64, 128, 1024])


def columns_of(row: int, width: int) -> set[int]:
    return {column for column in range(width) if row >> (width - 1 - column) & 1}


@given(WIDTHS, st.data(), st.integers(0, 1 << 30))
def test_holders_are_some_of_those_there_are(width: int, data: st.DataObject, seed: int) -> None:
    row = data.draw(st.integers(0, (1 << width) - 1)) & data.draw(st.integers(0, (1 << width) - 1))
    near = data.draw(st.integers(0, (1 << width) - 1))
    found = sample(row, near, width, random.Random(seed).random)
    held, close = columns_of(row, width), columns_of(row & near, width)
    assert len(set(found)) == len(found)
    assert set(found) <= held
    expected = min(NEAR if held - close else MAX_HOLDERS, len(close))
    assert len(close & set(found)) >= expected
    assert len(found) == expected + min(MAX_HOLDERS - expected, len(held - close))


def test_every_holder_is_as_likely_as_any_other() -> None:
    chance = random.Random(1).random
    for width, held in ((64, range(10, 30)), (1024, range(100)), (1024, range(0, 1024, 2))):
        row = sum(1 << (width - 1 - column) for column in held)
        rounds = 300 * len(held) // MAX_HOLDERS
        seen = Counter(column for _ in range(rounds) for column in sample(row, 0, width, chance))
        assert set(seen) == set(held)
        assert max(seen.values()) < 2 * min(seen.values())
