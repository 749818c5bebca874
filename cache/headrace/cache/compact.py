"""Safetensors headers as the format's own writers write them, read column by column.

A JSON parser makes a tree of three objects for each tensor, which then has to be checked leaf by leaf. Such
headers repeat one pattern, so that cutting the text along it gives columns, and each column is checked as a whole:
a third of the time for 20,000 tensors. Whatever is not exactly of that pattern is left to the general parser,
which also finds the words for what is wrong; nothing is accepted here that it refuses.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

_METADATA = '{"__metadata__"'
_GROUPS = 3  # of a tensor: its name, its form, its offsets
_LARGEST = 2**63 - 1
_BEGINNING = re.compile(r'\{"[^"\\]*"(: ?)\{"dtype"\1"\w*"(, ?)"shape"')


class Columns(NamedTuple):
    """The tensors of a header. Each begins where the one before ends, the first at 0, and none is empty. Whether
    a name occurs twice is not known yet.

    Attributes:
        metadata: as parsed, not checked further than that no name occurs twice.
        starts, stops: bytes from the first tensor byte.
    """

    metadata: Any
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    stops: list[int]


def read_columns(text: str, dtype_bits: Mapping[str, int]) -> Columns | None:
    """Read a header's text, which starts with "{"; None where it is not of the pattern."""
    try:
        metadata, text = _split_metadata(text)
        return _columns(text, metadata, dtype_bits)
    except (ValueError, RecursionError):  # not JSON where numbers or texts were expected
        return None


def _split_metadata(text: str) -> tuple[Any, str]:
    """The value of the leading __metadata__ entry, and the text without it."""
    if not text.startswith(_METADATA):
        return None, text
    colon = len(_METADATA)
    begin = colon + 2 if text[colon : colon + 2] == ": " else colon + 1
    if text[colon : colon + 1] != ":":
        raise ValueError("no colon")
    value, end = json.JSONDecoder(object_pairs_hook=_unique).raw_decode(text, begin)
    rest = text[end:]
    if not rest.startswith(","):
        raise ValueError("no tensors")
    return value, "{" + rest[1:].removeprefix(" ")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


@functools.cache
def _tensor(colon: str, comma: str) -> re.Pattern[str]:
    """One tensor: its name; dtype and shape as they are written; its offsets. No part can run on into the next
    tensor, so that searching takes a time proportional to the text, whatever that is."""
    name = r'[^"\\\x00-\x1f]*'
    form = rf'\w*"{comma}"shape"{colon}\[[0-9, ]*'
    offsets = rf"[0-9]+{comma}[0-9]+"
    return re.compile(
        rf'"({name})"{colon}\{{"dtype"{colon}"({form})\]{comma}"data_offsets"{colon}\[({offsets})\]\}}'
    )


_tensor(":", ",")  # as nearly every writer writes; compiling it takes a millisecond of a load


def _columns(text: str, metadata: Any, dtype_bits: Mapping[str, int]) -> Columns | None:
    # The separators of the first tensor are those of all.
    beginning = _BEGINNING.match(text)
    if beginning is None:
        return None
    colon, comma = beginning.groups()
    pieces = _tensor(colon, comma).split(text)
    between, names, forms, offsets = (pieces[first :: _GROUPS + 1] for first in range(_GROUPS + 1))
    count = len(names)
    if not count or between[0] != "{" or between[-1].rstrip(" ") != "}" or between.count(comma) != count - 1:
        return None
    if "__metadata__" in names:
        return None
    dtype_of: dict[str, str] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    size_of: dict[str, int] = {}
    for form in set(forms):
        dtype, _, shape = form.partition(f'"{comma}"shape"{colon}[')
        if dtype not in dtype_bits:
            return None
        dtype_of[form], shape_of[form] = dtype, _sizes(shape)
        elements = math.prod(shape_of[form])
        bits = elements * dtype_bits[dtype]
        if bits % 8 or not 0 < elements <= _LARGEST:  # empty tensors have an order of their own
            return None
        size_of[form] = bits // 8
    stops = list(accumulate(map(size_of.__getitem__, forms)))
    starts = [0, *stops[:-1]]
    # Writing the numbers that have to be there takes half the time of reading those that are.
    expected = [0] * (2 * count)
    expected[0::2], expected[1::2] = starts, stops
    if comma.join(offsets) != str(expected)[1:-1].replace(", ", comma):
        return None
    dtypes, shapes = map(dtype_of.__getitem__, forms), map(shape_of.__getitem__, forms)
    return Columns(metadata, names, list(dtypes), list(shapes), starts, stops)


def _sizes(text: str) -> tuple[int, ...]:
    """Integers from 0 to 2^63 - 1, separated by commas."""
    values: list[int] = json.loads(f"[{text}]")
    if values and (set(map(type, values)) != {int} or max(values) > _LARGEST):
        raise ValueError("not sizes")
    return tuple(values)
