"""Headers of the writers' own pattern are read by columns: the same result as the general parser's, or none."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cache import safetensors
from headrace.cache.compact import read_columns
from headrace.cache.errors import CheckpointError
from headrace.cache.safetensors import DTYPE_BITS, Header, parse_header

NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
TENSORS = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=6,
    unique_by=lambda one: one[0],
)


def header(tensors: list[tuple[str, str, list[int]]], metadata: Any = None) -> tuple[dict[str, Any], int]:
    """As JSON, and the size of the data."""
    result: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        elements = 1
        for size in shape:
            elements *= size
        size = elements * DTYPE_BITS[dtype] // 8
        result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return result, end


def parse(text: str, data: int, *, by_columns: bool) -> Header | None:
    """None: refused."""
    head = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        if not by_columns:
            patch.setattr(safetensors, "read_columns", lambda text, bits: None)
        try:
            return parse_header(head, 8 + len(head) + data, "file")
        except CheckpointError:
            return None


@given(
    TENSORS,
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.none() | st.dictionaries(NAMES, NAMES),
    st.booleans(),
)
def test_both_ways_give_the_same(
    tensors: list[tuple[str, str, list[int]]], separators: tuple[str, str], metadata: Any, ascii: bool
) -> None:
    value, data = header(tensors, metadata)
    text = json.dumps(value, separators=separators, ensure_ascii=ascii) + " " * (len(tensors) % 3)
    assert parse(text, data, by_columns=True) == parse(text, data, by_columns=False)


@given(TENSORS, st.data())
def test_nothing_is_accepted_that_the_general_parser_refuses(
    tensors: list[tuple[str, str, list[int]]], data: st.DataObject
) -> None:
    value, size = header(tensors, data.draw(st.none() | st.just({"format": "pt"})))
    text = json.dumps(value, separators=(",", ":"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(1, len(text) - 1))
        piece = data.draw(
            st.sampled_from([*list('"{}[],:\\ -0159.eE\t\x01'), "", ",0", "]}", '"a":1,', " ", "null"])
        )
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 2)) :]
    if text.startswith("{"):
        assert parse(text, size, by_columns=True) == parse(text, size, by_columns=False)


def entry(name: str, shape: str, offsets: str, dtype: str = '"U8"') -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


GOOD = entry("a", "[2]", "[0,2]"), entry("b", "[3]", "[2,5]")


@pytest.mark.parametrize(
    "text",
    [
        entry("a", "[2]", "[0,2,2]") + "," + entry("b", "[3]", "[5]"),  # as many numbers, wrongly shared
        entry("a", "[2]", "[0 2]"),
        entry("a", "[2]", "[00,2]"),
        entry("a", "[02]", "[0,2]"),
        entry("a", "[2]", "[-0,2]"),
        entry("a", "[2.0]", "[0,2]"),
        entry("a", "[2]", "[0,2.0]"),
        entry("a", "[2]", "[0,[2]]"),
        entry("a", "[true,2]", "[0,2]"),
        entry("a", "[NaN]", "[0,2]"),
        entry("a", "[2,]", "[0,2]"),
        entry("a", "[9223372036854775808]", "[0,2]"),
        entry("a", "[4294967296,4294967296]", "[0,2]"),
        entry("a", "[2]", "[2,0]"),
        entry("a\tb", "[2]", "[0,2]"),
        entry("a\\u0000", "[2]", "[0,2]"),
        entry("a", "[2]", "[0,2]", '"U9"'),
        entry("a", "[2]", "[0,2]", '"F4"'),
        GOOD[0] + "," + GOOD[0],
        GOOD[0] + GOOD[1],
        GOOD[0] + "," + entry("b", "[3]", "[3,6]"),
        GOOD[0] + "," + entry("b", "[3]", "[1,4]"),
        GOOD[0] + "," + entry("__metadata__", "[3]", "[2,5]"),
        GOOD[0] + ',"__metadata__":{"a":"b"},' + GOOD[1],
        '"__metadata__":{"a":"b","a":"c"},' + GOOD[0],
        '"__metadata__":{"a":1},' + GOOD[0],
        '"__metadata__":[],' + GOOD[0],
        '"__metadata__":{"a":"b"}',
        '"__metadata__":{"a":"b"}' + GOOD[0],
        '"__metadata__":null,' + GOOD[0],
    ],
)
@pytest.mark.parametrize("size", [0, 2, 5, 6])
def test_what_looks_almost_like_the_pattern_is_decided_alike(text: str, size: int) -> None:
    whole = "{" + text + "}"
    assert parse(whole, size, by_columns=True) == parse(whole, size, by_columns=False)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_pattern_is_recognized_in_file_order(separators: tuple[str, str], shuffled: bool) -> None:
    value, _ = header(
        [(f"layer.{n}", "BF16", [n + 1, 4]) for n in range(100)], {"format": "pt", 'quo"te': "\\"}
    )
    tensors = [(name, one) for name, one in value.items() if name != "__metadata__"]
    if shuffled:
        random.Random(1).shuffle(tensors)
    text = json.dumps({"__metadata__": value["__metadata__"], **dict(tensors)}, separators=separators)
    columns = read_columns(text, DTYPE_BITS)
    if shuffled:
        assert columns is None
    else:
        assert columns is not None
        assert columns.names == [name for name, _ in tensors]
