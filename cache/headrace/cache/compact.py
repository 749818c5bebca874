"""Safetensors headers as the format's own writers write them, read column by column.

A JSON parser makes a tree of three objects for each tensor, which then has to be checked leaf by leaf. Such
headers repeat one pattern, so that cutting the text at its quotation marks gives columns, and each column is
checked as a whole: a third of the time for 20,000 tensors. Whatever is not exactly of that pattern is left to
the general parser, which also finds the words for what is wrong; nothing is accepted here that it refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import repeat
from operator import sub
from typing import Any, NamedTuple

_METADATA = '{"__metadata__"'
_COLUMNS = 10  # pieces between quotation marks for each tensor
_LARGEST = 2**63 - 1


class Columns(NamedTuple):
    """The tensors of a header, in the order of the text. Offsets are bytes from the first tensor byte.

    Attributes:
        metadata: as parsed, not checked further than that no name occurs twice.
        gapless: each tensor begins where the one before ends, the first at 0, and none is empty.
    """

    metadata: Any
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    stops: list[int]
    gapless: bool


def read_columns(text: str, dtype_bits: Mapping[str, int]) -> Columns | None:
    """Read a header's text, which starts with "{"; None where it is not of the pattern."""
    try:
        metadata, text = _split_metadata(text)
        return None if "\\" in text else _columns(text, metadata, dtype_bits)
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


def _columns(text: str, metadata: Any, dtype_bits: Mapping[str, int]) -> Columns | None:
    pieces = text.split('"')
    count, rest = divmod(len(pieces) - 1, _COLUMNS)
    if rest or not count or pieces[0] != "{":
        return None
    # The separators of the first tensor are those of all.
    colon, comma = pieces[4], pieces[6]
    if colon not in (":", ": ") or comma not in (",", ", "):
        return None
    expected = {2: colon + "{", 3: "dtype", 4: colon, 6: comma, 7: "shape", 9: "data_offsets"}
    if any(pieces[place::_COLUMNS].count(piece) != count for place, piece in expected.items()):
        return None
    names, dtypes = pieces[1::_COLUMNS], pieces[5::_COLUMNS]
    if len(set(names)) != count or "__metadata__" in names or not "".join(names).isprintable():
        return None
    if not dtype_bits.keys() >= set(dtypes):
        return None
    forms = list(zip(dtypes, pieces[8::_COLUMNS], strict=True))
    shape_of: dict[str, tuple[int, ...]] = {}
    size_of: dict[tuple[str, str], int] = {}
    for dtype, piece in set(forms):
        shape = shape_of[piece] = tuple(_numbers(_between(piece, colon + "[", "]" + comma)))
        elements = math.prod(shape)
        bits = elements * dtype_bits[dtype]
        if bits % 8 or not 0 < elements <= _LARGEST:  # empty tensors have an order of their own
            return None
        size_of[dtype, piece] = bits // 8
    offsets = pieces[10::_COLUMNS]
    offsets[-1] = _between(offsets[-1].rstrip(" "), "", "}") + comma
    pairs = _between("".join(offsets), colon + "[", "]}" + comma).split("]}" + comma + colon + "[")
    if len(pairs) != count or list(map(str.count, pairs, repeat(","))).count(1) != count:
        return None
    numbers = _numbers(",".join(pairs))
    starts, stops = numbers[0::2], numbers[1::2]
    if list(map(sub, stops, starts)) != list(map(size_of.__getitem__, forms)):
        return None
    gapless = starts[0] == 0 and starts[1:] == stops[:-1]
    shapes = list(map(shape_of.__getitem__, pieces[8::_COLUMNS]))
    return Columns(metadata, names, dtypes, shapes, starts, stops, gapless)


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        raise ValueError("not of the pattern")
    return text[len(before) : len(text) - len(after)]


def _numbers(text: str) -> list[int]:
    """Integers from 0 to 2^63 - 1, separated by commas."""
    values: list[int] = json.loads(f"[{text}]")
    if values and (set(map(type, values)) != {int} or "-" in text or max(values) > _LARGEST):
        raise ValueError("not sizes")
    return values
