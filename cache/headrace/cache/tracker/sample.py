"""A few random ones among the set bits of a row."""

from __future__ import annotations

from collections.abc import Callable

from headrace.cache.tracker.protocol import MAX_HOLDERS

NEAR = MAX_HOLDERS - 1
"""Holders of the asking node's own zone, at most, where there are others."""


def sample(row: int, near: int, width: int, chance: Callable[[], float]) -> list[int]:
    """Columns of a few holders, those of the own zone first.

    Args:
        row: bits of all holders; the first column is the highest of `width` bits.
        near: the same, of all columns of the own zone.
        chance: a number of [0, 1), another at each call.
    """
    close = row & near
    if close == row:
        return _some(row, width, MAX_HOLDERS, chance)
    chosen = _some(close, width, NEAR, chance) if close else []
    return chosen + _some(row & ~close, width, MAX_HOLDERS - len(chosen), chance)


def _some(row: int, width: int, most: int, chance: Callable[[], float]) -> list[int]:
    held = row.bit_count()
    if held * 16 < width or held <= most:
        found = []
        while row:
            top = row.bit_length()
            found.append(width - top)
            row ^= 1 << (top - 1)
        while len(found) > most:
            found[int(chance() * len(found))] = found[-1]
            found.pop()
        return found
    chosen: list[int] = []
    while len(chosen) < most:
        column = int(chance() * width)
        if row >> (width - 1 - column) & 1 and column not in chosen:
            chosen.append(column)
    return chosen
