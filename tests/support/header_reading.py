"""Reads one safetensors file three ways, and says where they must not differ.

Ours against the reference reader (the `safetensors` library, whose parser is another language's), and our quick
way for headers as libraries write them against our general one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from unittest import mock

import safetensors

from headrace.cache import safetensors as ours
from headrace.cache.errors import CheckpointError
from headrace.cache.safetensors import DTYPE_BITS, PREFIX, Header, header_length, parse_header

# What we refuse on purpose, although the reference reads it (see the parser's docstring).
_STRICTER = re.compile(
    r"names .* twice"
    r"|must have exactly dtype, shape and data_offsets"
    r"|does not start with '\{'"
    r"|is JSON text"  # white space before "{", in a header whose length is that of a text
    r"|is not a size \(an integer from 0 to 2\^63 - 1\)"
    r"|its shape overflows 2\^63 elements"
    r"|is not a range of bytes"
    r"|contains the negative number",  # under a key that the format does not have
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether we accept a file, whether the reference does, and our reason if we do not."""

    accepted: bool
    reference: bool
    why: str = ""


def examine(content: bytes) -> Verdict:
    """Read a file.

    Raises:
        AssertionError: we raise anything but our error, accept what the reference refuses or what does not lie in
            the file, read something else than the reference does, or refuse what nobody should.
    """
    header, why = _ours(content)
    with _general_parser_only():
        general, _ = _ours(content)
    assert header == general, "the quick way and the general one differ"
    assert header is None or list(header.tensors) == list(general.tensors if general else ())
    try:
        found = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except (
        safetensors.SafetensorError,
        ValueError,
    ) as error:  # ValueError: a length of 2^64 - 1 overflows there
        assert header is None, f"accepted what the reference refuses: {error}"
        return Verdict(False, False, why)
    if header is None:
        assert _STRICTER.search(why), f"refused what the reference reads: {why}"
        return Verdict(False, True, why)
    _check_places(header, len(content))
    _check_alike(header, content, found)
    return Verdict(True, True)


def _ours(content: bytes) -> tuple[Header | None, str]:
    try:
        length = header_length(content[:PREFIX], len(content), "m")
        return parse_header(content[PREFIX : PREFIX + length], len(content), "m"), ""
    except CheckpointError as error:
        assert str(error).startswith("m "), error
        return None, str(error)


def _general_parser_only() -> Any:
    """A context in which the quick way finds nothing to its liking."""
    return mock.patch.object(ours, "read_columns", lambda _text, _bits: None)


def _check_places(header: Header, size: int) -> None:
    """The tensors cover the data from its first to its last byte, one after another, each as long as it says."""
    at = header.data_start
    for name, info in header.tensors.items():
        assert info.name == name
        count = 1
        for length in info.shape:
            assert type(length) is int
            assert length >= 0
            count *= length
        assert (info.stop - info.start) * 8 == count * DTYPE_BITS[info.dtype]
        assert header.data_start + info.start == at
        at = header.data_start + info.stop
    assert at == size == header.file_size


def _check_alike(header: Header, content: bytes, found: list[tuple[str, dict[str, Any]]]) -> None:
    base = header.data_start
    read = {
        name: (info.dtype, list(info.shape), content[base + info.start : base + info.stop])
        for name, info in header.tensors.items()
    }
    assert read == {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in found}
