"""The header parser against the reference reader, on generated and on damaged files."""

from __future__ import annotations

import json
import struct
from collections import Counter
from random import Random
from typing import Any

import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.header_mutations import good_file, mutated
from support.header_reading import examine
from support.safetensors_files import Entry, file_bytes, raw_file

from headrace.cache.safetensors import DTYPE_BITS, PREFIX, Header, header_length, parse_header

TEXT = st.characters(exclude_categories=["Cs"])
NAMES = st.text(TEXT, max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    result = []
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        count = 1
        for size in shape:
            count *= size
        if count * DTYPE_BITS[dtype] % 8:
            shape, count = (*shape, 4), count * 4
        result.append(Entry(name, dtype, shape, bytes(count * DTYPE_BITS[dtype] // 8)))
    return result


METADATA = st.none() | st.dictionaries(st.text(TEXT, max_size=5), st.text(TEXT, max_size=5), max_size=3)


def reference_reads(content: bytes) -> Any:
    return safetensors.deserialize(content)  # type: ignore[no-untyped-call]


def parse(content: bytes) -> Header:
    length = header_length(content[:PREFIX], len(content), "m")
    return parse_header(content[PREFIX : PREFIX + length], len(content), "m")


@settings(deadline=None, max_examples=150)
@given(entries(), METADATA, st.integers(0, 9))
def test_a_well_formed_file_reads_as_the_reference_reads_it(
    made: list[Entry], metadata: dict[str, str] | None, padding: int
) -> None:
    content = file_bytes(made, metadata, shift=padding)
    header = parse(content)
    found = {
        name: (info.dtype, list(info.shape), content[header.data_start :][info.start : info.stop])
        for name, info in header.tensors.items()
    }
    reference = {name: (v["dtype"], v["shape"], bytes(v["data"])) for name, v in reference_reads(content)}
    assert found == reference
    assert header.metadata == metadata


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    entries(),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255), st.sampled_from("sid")), max_size=4),
    st.integers(0, 40),
)
def test_a_damaged_file_is_refused_with_our_error_or_reads_as_the_reference_reads_it(
    made: list[Entry], changes: list[tuple[int, int, str]], cut: int
) -> None:
    content = bytearray(file_bytes(made))
    for position, byte, kind in changes:
        at = position % len(content)
        if kind == "s":
            content[at] = byte
        elif kind == "i":
            content.insert(at, byte)
        elif len(content) > 1:
            del content[at]
    compare(bytes(content[: len(content) - cut] if cut < 20 else content))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)
ALMOST = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 2**65) | st.integers(0, 3), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | JSON_VALUES,
        "more": JSON_VALUES,
    },
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ALMOST | JSON_VALUES, max_size=3),
    st.booleans(),
)
@example({"a": {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, True)
def test_a_header_of_arbitrary_json_is_refused_with_our_error_or_good(
    value: dict[str, object], ascii: bool
) -> None:
    try:
        head = json.dumps(value, ensure_ascii=ascii).encode(errors="surrogatepass")
    except ValueError:
        return
    compare(struct.pack("<Q", len(head)) + head + bytes(4))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_with_our_error_or_good(content: bytes) -> None:
    compare(content)
    compare(struct.pack("<Q", len(content)) + content)


@settings(deadline=None, max_examples=600)
@given(st.randoms(use_true_random=False))
def test_a_file_damaged_where_it_hurts_is_refused_or_reads_as_the_reference_reads_it(choose: Random) -> None:
    compare(mutated(choose, good_file(choose)))


def test_a_thousand_damaged_files_are_read_alike_and_some_are_still_good() -> None:
    """As the campaign does; here the files are always the same."""
    found = Counter[tuple[bool, bool]]()
    for number in range(1000):
        choose = Random(number)
        verdict = examine(mutated(choose, good_file(choose)))
        found[verdict.accepted, verdict.reference] += 1
    assert found[True, True] > 20
    assert found[False, False] > 500
    assert found[False, True] > 5  # stricter, on purpose
    assert not found[True, False]


def test_a_metadata_entry_without_a_value_is_refused() -> None:
    compare(raw_file(b'{"__metadata__"'))  # the quick way once looked for its colon


def compare(content: bytes) -> None:
    """Never anything but our error; what we accept, the reference accepts, with the same meaning and bytes."""
    examine(content)
