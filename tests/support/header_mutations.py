"""Damages safetensors files the way bugs, attackers and bad disks do, knowing what the bytes mean.

`mutated` takes a good file apart into header and data, changes a few things of the header's text or of its
values (or of the raw bytes, the length or the data), and puts it together again. What comes out is mostly wrong,
often only just, and sometimes still good.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from support.safetensors_files import Entry, file_bytes

from headrace.cache.safetensors import DTYPE_BITS, PREFIX

_DTYPES = (*DTYPE_BITS, "F128", "BF16 ", "bf16", "", "I4", "F8_E4M3FN", "\u0000")
_NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, 10**30, -1, -(2**63), 1.0, 0.5, 1e3, 1e400, True, False, None, "1", [], [1], {}),
)
_NAMES = (
    "",
    "a",
    "a.b",
    "__metadata__",
    "__metadata",
    "é",
    "\U0001f600",
    "a\u0000b",
    ":",
    '"',
    "\\",
    "a" * 300,
)
# Replaced in the text itself: what no JSON library would write.
_TEXTS = (
    *(
        " ",
        "\n",
        "\t",
        "\r",
        "\x00",
        "\x0b",
        "\u00a0",
        "\ufeff",
        ",",
        ":",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        "/",
    ),
    *(
        "null",
        "true",
        "NaN",
        "Infinity",
        "-Infinity",
        "-0",
        "-0.0",
        "00",
        "01",
        "1.",
        ".5",
        "1e0",
        "1E+1",
        "0x10",
    ),
    *(
        "\\u0061",
        "\\ud800",
        "\\udc00\\ud800",
        "\\u0000",
        "\\x61",
        "\\/",
        "//",
        "/* */",
        "{}",
        "[[]]",
        '"a":1,',
    ),
)

Change = Callable[[random.Random, dict[str, Any]], None]


def good_file(choose: random.Random) -> bytes:
    """A well-formed file of a few small tensors."""
    entries = []
    for number in range(choose.choice((0, 1, 1, 2, 3, 5))):
        dtype = choose.choice(tuple(DTYPE_BITS))
        shape = [choose.choice((0, 1, 2, 3, 4, 8)) for _ in range(choose.randrange(4))]
        count = 1
        for size in shape:
            count *= size
        if count * DTYPE_BITS[dtype] % 8:
            shape, count = [*shape, 4], count * 4
        name = choose.choice((f"t{number}", f"layers.{number}.weight", f"{choose.choice(_NAMES)}{number}"))
        entries.append(Entry(name, dtype, tuple(shape), choose.randbytes(count * DTYPE_BITS[dtype] // 8)))
    metadata = choose.choice((None, None, {}, {"format": "pt"}, {"a:b": "{}", "é": ""}))
    return file_bytes(entries, metadata, align=choose.choice((1, 8)), shift=choose.randrange(3))


def mutated(choose: random.Random, content: bytes) -> bytes:
    """The file with one to four changes."""
    for _ in range(choose.choice((1, 1, 1, 2, 2, 3, 4))):
        content = choose.choice(_WAYS)(choose, content)
    return content


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data, as far as the length allows."""
    length = int.from_bytes(content[:PREFIX], "little")
    return content[PREFIX : PREFIX + length], content[PREFIX + length :]


def joined(head: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


# -- ways to damage a file ------------------------------------------------------------------------------


def _by_value(choose: random.Random, content: bytes) -> bytes:
    head, data = split(content)
    try:
        value = json.loads(head)
    except (ValueError, RecursionError):
        return _by_text(choose, content)
    if not isinstance(value, dict) or not value:
        return _by_text(choose, content)
    choose.choice(_CHANGES)(choose, value)
    if choose.random() < 0.2:
        items = list(value.items())
        choose.shuffle(items)
        value = dict(items)
    try:
        written = json.dumps(
            value,
            separators=choose.choice(((",", ":"), (", ", ": "))),
            ensure_ascii=choose.random() < 0.5,
            indent=choose.choice((None, None, 1)),
        )
        return joined(written.encode(), data)
    except ValueError:  # half of a surrogate pair, or a circle
        return joined(head, data)


def _by_text(choose: random.Random, content: bytes) -> bytes:
    head, data = split(content)
    text = head.decode(errors="surrogateescape")
    at = choose.randrange(len(text) + 1)
    end = min(len(text), at + choose.choice((0, 0, 1, 1, 2, 8)))
    piece = choose.choice(_TEXTS)
    kind = choose.randrange(4)
    if kind == 0:  # again what is already there: duplicate keys, doubled commas
        start = choose.randrange(len(text) + 1)
        piece = text[start : start + choose.choice((1, 5, 20, 60))]
    elif kind == 1:  # where it counts: at a token's edge
        edges = [place for place, sign in enumerate(text) if sign in '{}[]:,"']
        at = end = choose.choice(edges) + choose.randrange(2) if edges else at
    elif kind == 2:
        piece *= choose.choice((1, 2, 50, 2000))
    changed = text[:at] + piece + text[end:]
    return joined(changed.encode(errors="surrogateescape"), data)


def _by_byte(choose: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 5))):
        # Mostly the first bytes: the length, and the header's beginning.
        at = choose.randrange(min(len(damaged), choose.choice((9, 40, 400))) or 1)
        if not damaged:
            break
        kind = choose.randrange(4)
        if kind == 0:
            damaged[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            damaged[at] = choose.choice((0, 0x20, 0x22, 0x7B, 0x7D, 0x80, 0xC0, 0xED, 0xFF))
        elif kind == 2:
            damaged.insert(at, choose.randrange(256))
        else:
            del damaged[at]
    return bytes(damaged)


def _by_length(choose: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:PREFIX], "little")
    wrong = choose.choice(
        (
            *(length - 1, length + 1, length + 8, 0, 1, 2, len(content), len(content) - 8, len(content) - 7),
            *(100_000_000, 100_000_001, 2**31, 2**32 + length, 2**63, 2**64 - 1, 2**64 - 8),
        )
    )
    return struct.pack("<Q", wrong % 2**64) + content[PREFIX:]


def _by_size(choose: random.Random, content: bytes) -> bytes:
    if choose.random() < 0.6:
        return content[: choose.randrange(len(content) + 1)]
    return content + choose.choice((b"\0", b" ", b"\0" * 8, content[:40]))


def _by_padding(choose: random.Random, content: bytes) -> bytes:
    head, data = split(content)
    before = choose.choice((b"", b"", b" ", b"\n", b"\xef\xbb\xbf"))
    after = choose.choice((b" ", b"  ", b"\0", b"\n", b"\t ", b" x", b"{}", b" " * 5000))
    return joined(before + head + after, data)


_WAYS = (_by_value, _by_value, _by_value, _by_text, _by_text, _by_byte, _by_length, _by_size, _by_padding)


# -- changes of the header's values ---------------------------------------------------------------------


def _tensor(choose: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for entry in header.values() if isinstance(entry, dict)]
    return choose.choice(entries) if entries else header


def _change_dtype(choose: random.Random, header: dict[str, Any]) -> None:
    _tensor(choose, header)["dtype"] = choose.choice((*_DTYPES, *_NUMBERS))


def _change_shape(choose: random.Random, header: dict[str, Any]) -> None:
    entry = _tensor(choose, header)
    shape = entry.get("shape")
    if not isinstance(shape, list) or choose.random() < 0.1:
        entry["shape"] = choose.choice(_NUMBERS)
        return
    kind = choose.randrange(4)
    if kind == 0 and shape:
        shape[choose.randrange(len(shape))] = choose.choice(_NUMBERS)
    elif kind == 1:
        shape.insert(choose.randrange(len(shape) + 1), choose.choice((0, 1, 2, *_NUMBERS)))
    elif kind == 2 and shape:
        shape.pop()
    else:
        shape.reverse()


def _change_offsets(choose: random.Random, header: dict[str, Any]) -> None:
    entry = _tensor(choose, header)
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or choose.random() < 0.1:
        entry["data_offsets"] = choose.choice((*_NUMBERS, [0], [0, 0, 0], [0, 0]))
        return
    place = choose.randrange(2)
    number = offsets[place]
    if type(number) is int and choose.random() < 0.6:
        offsets[place] = number + choose.choice((-1, 1, 8, -8, 2**64, -number))
    elif choose.random() < 0.5:
        offsets[place] = choose.choice(_NUMBERS)
    else:
        offsets.reverse()


def _move_all(choose: random.Random, header: dict[str, Any]) -> None:
    by = choose.choice((-1, 1, 8))
    for entry in header.values():
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [n + by if type(n) is int else n for n in entry["data_offsets"]]


def _swap(choose: random.Random, header: dict[str, Any]) -> None:
    """Two tensors get each other's place: overlaps, or another order; or both get the same."""
    one, other = _tensor(choose, header), _tensor(choose, header)
    first, second = one.get("data_offsets"), other.get("data_offsets")
    one["data_offsets"], other["data_offsets"] = second, first if choose.random() < 0.7 else second


def _change_keys(choose: random.Random, header: dict[str, Any]) -> None:
    entry = choose.choice((header, _tensor(choose, header)))
    kind = choose.randrange(3)
    if kind == 0 and entry:
        entry.pop(choose.choice(list(entry)))
    elif kind == 1:
        entry[choose.choice((*_NAMES, "dtype", "shape", "data_offsets", "Dtype"))] = choose.choice(_NUMBERS)
    elif entry:
        key = choose.choice(list(entry))
        entry[choose.choice(_NAMES)] = entry.pop(key)


def _change_metadata(choose: random.Random, header: dict[str, Any]) -> None:
    header["__metadata__"] = choose.choice(
        (
            None,
            {},
            [],
            "a",
            1,
            {"a": 1},
            {"a": None},
            {"a": "b"},
            {"a": {}},
            {"": ""},
            {"é": "\ud800"},
            {"a": "\u0000"},
        )
    )


def _empty_tensor(choose: random.Random, header: dict[str, Any]) -> None:
    at = choose.choice((0, 1, 4, 8, 2**63 - 1))
    shape = choose.choice(([0], [0, 2**63 - 1], [2**62, 4, 0], [0, 2**64], [2**63 - 1, 2**63 - 1, 0]))
    header[choose.choice(_NAMES)] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at]}


def _huge_tensor(choose: random.Random, header: dict[str, Any]) -> None:
    """Sizes whose product, or product times the dtype's size, wraps around at 64 bits."""
    shape = choose.choice(([2**62, 4], [2**61, 8], [2**32, 2**32], [2**63, 2], [2**64 + 1], [2**60, 2]))
    at = choose.choice((0, 1, 8))
    header["huge"] = {"dtype": choose.choice(("U8", "F64", "F4")), "shape": shape, "data_offsets": [0, at]}


def _nest(choose: random.Random, header: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(choose.choice((3, 100, 127, 128, 129, 900))):
        value = [value] if choose.random() < 0.5 else {"a": value}
    _tensor(choose, header)[choose.choice(("shape", "data_offsets", "more"))] = value


_CHANGES: tuple[Change, ...] = (
    _change_dtype,
    _change_shape,
    _change_shape,
    _change_offsets,
    _change_offsets,
    _move_all,
    _swap,
    _change_keys,
    _change_metadata,
    _empty_tensor,
    _huge_tensor,
    _nest,
)
