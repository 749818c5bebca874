"""The safetensors header: which tensor lies where in a file.

The format (https://github.com/huggingface/safetensors, README, "Format"): 8 bytes, the length N of the
header as a little-endian unsigned integer; N bytes of JSON that start with "{" and may end in spaces;
then the data, which the tensors cover without holes or overlaps.

What is accepted here is what the reference reader (0.8.0) accepts, less what no careful writer makes:
duplicate names, keys of an entry that are not in the format, white space before "{", sizes of 2^63 and
more. A file that two readers could understand differently is refused.

No torch here: the chunk grid follows tensors, and nodes that only stage have no torch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, NoReturn

from headrace.cache.compact import Columns, read_columns
from headrace.cache.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest header that is accepted, in bytes (the reference reader's own limit)."""

PREFIX = 8
"""Bytes before the header: its length."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every dtype of the format and the bits of one element (safetensors 0.8.0)."""

_LARGEST = 2**63 - 1
_METADATA = "__metadata__"

_PAGE = "is an HTML page, not a model: check the address and download it again"
_XML = "is an XML document, probably a server's error answer: check the address and download it again"
_PICKLE = "is a PyTorch checkpoint (.bin, .pt) or another Python pickle: convert it to safetensors first"

# What is found under a .safetensors name instead, by its first bytes. Asked only once they, as the header's
# length, made no sense.
_LOOKALIKES: tuple[tuple[bytes, str], ...] = (
    (b"version ", "is a Git LFS pointer, not the file itself: run `git lfs pull` or download it again"),
    (b"<!", _PAGE),
    (b"<html", _PAGE),
    (b"<HTML", _PAGE),
    (b"<?xml", _XML),
    (b"<Error", _XML),
    (b"{", "is JSON text, probably a server's error answer or an index: give the .safetensors file itself"),
    (
        b"PK\x03\x04",
        "is a zip archive, as PyTorch checkpoints (.bin, .pt) are: convert it to safetensors first",
    ),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"GGUF", "is a GGUF file: use its safetensors version"),
    (b"\x1f\x8b", "is gzip-compressed: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: decompress it first"),
    (b"\x93NUMPY", "is a NumPy array file: convert it to safetensors first"),
    (b"\x89HDF", "is an HDF5 file (.h5): convert it to safetensors first"),
)

_brief = reprlib.Repr()
_brief.maxstring = 200
_quote = _brief.repr  # messages stay readable whatever the file contains


class TensorInfo(NamedTuple):
    """One tensor of a header. `start` and `stop` are byte offsets from `Header.data_start`.

    A named tuple, not a dataclass: a header may list 20,000, and these cost a third as much to make.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


_new_tuple = tuple.__new__  # half the time of TensorInfo(...), and there are thousands of them


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name, in the order of their bytes in the file (empty ones by name among equals).
        metadata: the free-form texts, or None where the header has none.
        data_start: offset in the file of the first tensor byte.
        file_size: size of the whole file in bytes; the tensors end exactly there.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    data_start: int
    file_size: int


def header_length(first8: bytes | bytearray | memoryview, file_size: int, where: str) -> int:
    """The number of header bytes that follow the first eight.

    Args:
        first8: the first eight bytes of the file; fewer only if it is shorter.
        file_size: of the whole file, in bytes.
        where: the file's name, for messages.

    Raises:
        CheckpointError: the file is no safetensors file (saying what it looks like), or is cut off.
    """
    first = bytes(first8[:PREFIX])
    if file_size == 0:
        raise CheckpointError(f"{where} is empty: download it again")
    length = int.from_bytes(first, "little")
    if len(first) == PREFIX and length <= min(MAX_HEADER, file_size - PREFIX):
        return length
    _refuse_lookalike(first, where)
    if len(first) < PREFIX:
        raise CheckpointError(
            f"{where} has only {file_size} bytes, too few for safetensors: download it again"
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{where} is not a safetensors file (its header would have {length} bytes, "
            f"at most {MAX_HEADER} are allowed): check that this is the right file"
        )
    missing = PREFIX + length - file_size
    raise CheckpointError(
        f"{where} is truncated within its header, at least {missing} bytes are missing: download it again"
    )


def parse_header(head: bytes | bytearray | memoryview, file_size: int, where: str) -> Header:
    """Check a header and return it.

    Args:
        head: exactly the `header_length` bytes after the first eight.
        file_size: of the whole file, in bytes.
        where: the file's name, for messages.

    Raises:
        CheckpointError: anything at all that is wrong with it.
    """
    if bytes(head[:1]) != b"{":
        _refuse_lookalike(len(head).to_bytes(PREFIX, "little"), where)
        raise CheckpointError(f"{where} is not a safetensors file (its header does not start with '{{')")
    data_start = PREFIX + len(head)
    with collector_paused():
        text = _decode(head, where)
        columns = read_columns(text, DTYPE_BITS)
        if columns is not None:
            header = _from_columns(columns, data_start, file_size, where)
            if len(header.tensors) == len(columns.names):
                return header
        entries = _parse_json(text, None, where)
        metadata = _check_metadata(entries.pop(_METADATA, None), where)
        infos = [_check_entry(name, entry, where) for name, entry in entries.items()]
        if not _surely_unique(text, entries, metadata):
            _parse_json(text, _unique, where)
        infos.sort(key=_file_order)
        _check_coverage(infos, file_size - data_start, where)
        return Header({info[0]: info for info in infos}, metadata, data_start, file_size)


def _from_columns(columns: Columns, data_start: int, file_size: int, where: str) -> Header:
    metadata = _check_metadata(columns.metadata, where)
    _check_end(columns.stops[-1], file_size - data_start, where)
    rows = zip(columns.names, columns.dtypes, columns.shapes, columns.starts, columns.stops, strict=True)
    tensors = dict(zip(columns.names, map(_new_tuple, repeat(TensorInfo), rows), strict=False))
    return Header(tensors, metadata, data_start, file_size)


def read_header(source: int | str | os.PathLike[str], where: str | None = None) -> Header:
    """Read and check the header of a complete file, given by path or by open descriptor.

    Raises:
        CheckpointError: as `header_length` and `parse_header`; also where the file cannot be opened.
    """
    name = where or (f"file descriptor {source}" if isinstance(source, int) else os.fspath(source))
    try:
        if isinstance(source, int):
            return _read_header(source, name)
        with open(source, "rb", buffering=0) as file:
            return _read_header(file.fileno(), name)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error


def _read_header(descriptor: int, where: str) -> Header:
    size = os.fstat(descriptor).st_size
    length = header_length(os.pread(descriptor, PREFIX, 0), size, where)
    head = bytearray()
    while len(head) < length:  # the kernel may return less than was asked for
        part = os.pread(descriptor, length - len(head), PREFIX + len(head))
        if not part:
            raise CheckpointError(f"{where} became shorter while its header was read: download it again")
        head += part
    return parse_header(head, size, where)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause cyclic garbage collection while very many objects are made that will all stay: walking them
    over and over takes several times as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Refused(ValueError):
    """What a JSON hook refuses; becomes a CheckpointError in `_parse_json`."""


def _decode(head: bytes | bytearray | memoryview, where: str) -> str:
    try:
        return str(head, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} has a damaged header: not UTF-8 at byte {error.start}; download it again"
        ) from error


def _surely_unique(text: str, entries: dict[str, Any], metadata: Mapping[str, str] | None) -> bool:
    """Whether no key occurs twice, told by counting colons; False means "look closely".

    Without escapes every colon of the text either follows a key or stands in a name or text that is still
    there, unless a key (and with it a colon) was dropped for a later one. Entries were checked: three keys
    each, and no colon within. This saves a third of the time that a hook for every object costs.
    """
    if "\\" in text:
        return False
    expected = 4 * len(entries) + "".join(entries).count(":")
    if metadata is not None:
        expected += 1 + len(metadata) + "".join(metadata).count(":") + "".join(metadata.values()).count(":")
    return text.count(":") == expected


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"names {_quote(key)} twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> NoReturn:
    raise _Refused(f"contains {text}, which is not JSON")


def _no_negative(text: str) -> int:
    if text.startswith("-"):
        raise _Refused(f"contains the negative number {text[:40]}")
    return int(text)


def _parse_json(
    text: str, pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None, where: str
) -> dict[str, Any]:
    try:
        # Python reads "-0" as the integer 0, the reference reader refuses it. The hook costs time for every
        # number, so it is set only where such a text occurs at all.
        negative = _no_negative if "-0" in text else None
        value = json.loads(
            text, object_pairs_hook=pairs_hook, parse_constant=_no_constant, parse_int=negative
        )
    except _Refused as error:
        raise CheckpointError(f"{where} has a damaged header: it {error}; download it again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} has a damaged header: not JSON ({error}); download it again"
        ) from error
    assert isinstance(value, dict)  # it starts with "{"
    return value


def _check_metadata(value: Any, where: str) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} has a damaged header: {_METADATA} is not an object of texts; download it again"
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(
                f"{where} has a damaged header: {_METADATA}[{_quote(key)}] is not a text; download it again"
            )
        if not (_encodable(key) and _encodable(text)):
            raise CheckpointError(
                f"{where} has a damaged header: {_METADATA}[{_quote(key)}] is not valid Unicode"
            )
    return value


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return False
    return True


def _check_entry(name: str, entry: Any, where: str) -> TensorInfo:
    if (
        type(entry) is not dict
        or len(entry) != 3
        or "dtype" not in entry
        or "shape" not in entry
        or "data_offsets" not in entry
    ):
        _refuse_entry(name, "its entry must have exactly dtype, shape and data_offsets", where)
    if not (name.isascii() or _encodable(name)):
        _refuse_entry(name, "its name is not valid Unicode", where)
    dtype = entry["dtype"]
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _refuse_entry(
            name, f"dtype {_quote(dtype)} is not one of the format's ({', '.join(DTYPE_BITS)})", where
        )
    shape = entry["shape"]
    if type(shape) is not list:
        _refuse_entry(name, f"shape {_quote(shape)} is not a list of sizes", where)
    count = 1
    for size in shape:
        # `type`, not isinstance: True and False are no sizes.
        if type(size) is not int or not 0 <= size <= _LARGEST:
            _refuse_entry(
                name, f"{_quote(size)} in its shape is not a size (an integer from 0 to 2^63 - 1)", where
            )
        count *= size
        if count > _LARGEST:
            _refuse_entry(name, "its shape overflows 2^63 elements", where)
    offsets = entry["data_offsets"]
    if type(offsets) is not list or len(offsets) != 2:
        _refuse_entry(name, f"data_offsets {_quote(offsets)} is not a pair", where)
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= _LARGEST:
        _refuse_entry(name, f"data_offsets {_quote(offsets)} is not a range of bytes", where)
    size_bits = count * bits
    if size_bits % 8:
        _refuse_entry(name, f"{count} elements of {dtype} do not end on a whole byte", where)
    if stop - start != size_bits >> 3:
        _refuse_entry(
            name, f"shape and dtype need {size_bits >> 3} bytes, data_offsets give it {stop - start}", where
        )
    return _new_tuple(TensorInfo, (name, dtype, tuple(shape), start, stop))


def _refuse_lookalike(first: bytes, where: str) -> None:
    for magic, what in _LOOKALIKES:
        if first.startswith(magic):
            raise CheckpointError(f"{where} {what}")


def _refuse_entry(name: str, reason: str, where: str) -> NoReturn:
    raise CheckpointError(f"{where} has a damaged header: tensor {_quote(name)}: {reason}; download it again")


def _file_order(info: TensorInfo) -> tuple[int, int, str]:
    return info[3], info[4], info[0]


def _check_coverage(infos: list[TensorInfo], data_size: int, where: str) -> None:
    """The tensors, in file order, must cover all `data_size` bytes with neither holes nor overlaps."""
    position = 0
    for name, _, _, start, stop in infos:
        if start != position:
            what = (
                f"leaves a hole of {start - position} bytes"
                if start > position
                else "overlaps another tensor"
            )
            _refuse_entry(name, f"its range {start}-{stop} {what}", where)
        position = stop
    _check_end(position, data_size, where)


def _check_end(position: int, data_size: int, where: str) -> None:
    if position > data_size:
        raise CheckpointError(
            f"{where} is truncated, {position - data_size} of {position} bytes of tensors are missing: "
            "download it again"
        )
    if position < data_size:
        raise CheckpointError(
            f"{where} has {data_size - position} bytes after its last tensor, which the format forbids: "
            "download it again"
        )
