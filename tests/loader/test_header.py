"""The safetensors header: what is accepted, and one clear sentence for everything else."""

from __future__ import annotations

import gc
import json
import struct
from pathlib import Path

import pytest
import safetensors
from support.safetensors_files import Entry, entry, file_bytes, raw_file

from headrace.cache.errors import CheckpointError
from headrace.cache.safetensors import DTYPE_BITS, MAX_HEADER, header_length, parse_header, read_header

ONE = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


def one(**change: object) -> bytes:
    return json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **change}}).encode()


def read(tmp_path: Path, content: bytes) -> str:
    """The message with which a file is refused."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "model.safetensors" in message
    assert "\n" not in message
    return message


def test_a_header_gives_name_dtype_shape_and_range_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    entries = [entry("b", "F32", (2, 3)), entry("a", "BF16", (5,)), entry("empty", "I64", (0, 4))]
    content = file_bytes(entries, {"format": "pt"})
    path.write_bytes(content)
    header = read_header(path)
    assert list(header.tensors) == ["b", "a", "empty"]
    assert header.tensors["b"] == ("b", "F32", (2, 3), 0, 24)
    assert header.tensors["a"] == ("a", "BF16", (5,), 24, 34)
    assert header.tensors["empty"].nbytes == 0
    assert header.metadata == {"format": "pt"}
    assert header.file_size == len(content)
    assert content[header.data_start :][24:34] == entries[1].data


def test_tensors_are_in_file_order_whatever_the_header_s_order() -> None:
    head = (
        b'{"late":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},'
        b'"early":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    assert list(parse_header(head, 8 + len(head) + 2, "m").tensors) == ["early", "late"]


def test_a_header_is_read_from_an_open_descriptor_too(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes([entry("a", "F16", (3,))]))
    with path.open("rb") as file:
        file.seek(5)
        assert list(read_header(file.fileno()).tensors) == ["a"]
        assert file.tell() == 5


def test_an_empty_checkpoint_and_null_metadata_are_accepted() -> None:
    assert parse_header(b"{}", 10, "m").tensors == {}
    assert parse_header(b'{"__metadata__":null}', 29, "m").metadata is None
    assert parse_header(b'{"__metadata__":{}}', 27, "m").metadata == {}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_has_the_size_the_reference_gives_it(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes([entry("a", dtype, (4, 2))]))
    assert read_header(path).tensors["a"].nbytes == DTYPE_BITS[dtype]
    with safetensors.safe_open(path, "pt") as reference:
        assert reference.get_slice("a").get_dtype() == dtype


def test_the_reference_knows_no_other_dtype(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file(one(dtype="X1"), b"xx"))
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.safe_open(path, "pt")
    named = str(caught.value).split("expected one of")[1].split(" at line")[0]
    assert {name.strip(" `") for name in named.split(",")} == set(DTYPE_BITS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"1234567", "only 7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"<html><body>sign in</body></html>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML document"),
        (b"<Error><Code>AccessDenied</Code></Error>", "XML document"),
        (b'{"error": "not found", "status": 404}', "JSON text"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(50), "zip archive"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"GGUF\x03\x00\x00\x00\x01\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "gzip"),
        (struct.pack("<Q", MAX_HEADER + 1) + bytes(20), "at most 100000000"),
        (b"\x1f\x8b\x00\x00\x00\x00\x00\x00" + bytes(40_000), "gzip"),  # could be a header's length
        (b"\xff" * 40, "not a safetensors file"),
        (struct.pack("<Q", 500) + b'{"a":', "truncated within its header, at least 495 bytes are missing"),
        (raw_file(ONE.encode(), b"x"), "truncated, 1 of 2 bytes"),
        (raw_file(ONE.encode(), b"xxx"), "1 bytes after its last tensor"),
    ],
)
def test_what_is_not_a_whole_safetensors_file_is_named_for_what_it_is(
    content: bytes, message: str, tmp_path: Path
) -> None:
    assert message in read(tmp_path, content)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "does not start with"),
        (b" " + ONE.encode(), "does not start with"),
        (b"[]", "does not start with"),
        (b"\xef\xbb\xbf{}", "does not start with"),
        (ONE.encode() + b"x", "not JSON"),
        (ONE.encode() + b"\0", "not JSON"),
        (b'{"a":' + b'{"a":' * 100_000, "not JSON"),
        (b'{"a\xff":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "not UTF-8"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', "negative number -0"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2' + b"0" * 5000 + b"]}}", "not JSON"),
        (b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "not valid Unicode"),
        (b'{"__metadata__":{"a":"\\udfff"}}', "not valid Unicode"),
        (b'{"__metadata__":{"a":1}}', "is not a text"),
        (b'{"__metadata__":[]}', "not an object"),
        (b'{"a":1}', "exactly dtype, shape and data_offsets"),
        (b'{"a":["U8",[2],[0,2]]}', "exactly dtype, shape and data_offsets"),
        (one(strides=[1]), "exactly dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"U8","shape":[2]}}', "exactly dtype, shape and data_offsets"),
        (one(dtype="U9"), "'U9' is not one of the format's"),
        (one(dtype=None), "None is not one of the format's"),
        (one(dtype=[1]), "is not one of the format's"),
        (one(shape=2), "is not a list"),
        (one(shape=[-2]), "-2 in its shape"),
        (one(shape=[2.0]), "2.0 in its shape"),
        (one(shape=[True, 2]), "True in its shape"),
        (one(shape=[2**63]), "in its shape"),
        (one(shape=[2**62, 4, 0], data_offsets=[0, 0]), "overflows"),
        (one(data_offsets=[0, 2, 2]), "is not a pair"),
        (one(data_offsets=[2, 0]), "is not a range"),
        (one(data_offsets=[-1, 1]), "is not a range"),
        (one(data_offsets=[0, 2.0]), "is not a range"),
        (one(data_offsets=[0, 1]), "need 2 bytes, data_offsets give it 1"),
        (one(dtype="F4", shape=[3]), "do not end on a whole byte"),
        (one(dtype="F6_E2M3", shape=[2]), "do not end on a whole byte"),
        (one(data_offsets=[1, 3]), "leaves a hole of 1 bytes"),
        (ONE[:-1].encode() + b',"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', "overlaps"),
        (ONE[:-1].encode() + b',"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}', "overlaps"),
        (ONE[:-1].encode() + b"," + ONE[1:].encode(), "names 'a' twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "names 'dtype' twice"),
        (b'{"__metadata__":{"k":"1","k":"2"},' + ONE[1:].encode(), "names 'k' twice"),
        (b'{"__metadata__":{"k":"1"},"__metadata__":{"k":"1"},' + ONE[1:].encode(), "__metadata__' twice"),
        (b'{"\\u0061":1,' + ONE[1:].encode(), "names 'a' twice"),
        (b'{"a:":1,"a:":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "names 'a:' twice"),
    ],
)
def test_a_damaged_header_is_refused_and_the_damage_named(head: bytes, message: str, tmp_path: Path) -> None:
    assert message in read(tmp_path, raw_file(head, b"xx"))


def test_a_duplicate_hidden_by_an_escaped_colon_is_found() -> None:
    # One colon more for the dropped key, one less for the escape in a name: the count alone would agree.
    head = (
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"\\u003a\\u003a\\u003a\\u003a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    )
    with pytest.raises(CheckpointError, match="'x' twice"):
        parse_header(head, 8 + len(head), "m")


def test_names_with_colons_quotes_and_any_script_are_kept() -> None:
    entries = [Entry(name, "U8", (1,), b"x") for name in ("a:b", 'q"uote', "ß/漢字", "", "tab\t", "😀")]
    content = file_bytes(entries, {"k:1": "v:2"})
    length = header_length(content[:8], len(content), "m")
    header = parse_header(content[8 : 8 + length], len(content), "m")
    assert list(header.tensors) == [one.name for one in entries]
    assert header.metadata == {"k:1": "v:2"}


def test_a_message_stays_short_whatever_the_header_contains() -> None:
    head = json.dumps({"n" * 10_000: {"dtype": "D" * 10_000, "shape": [], "data_offsets": [0, 1]}}).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_header(head, 8 + len(head) + 1, "m")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("head", [b"{}", b"{"])
def test_the_garbage_collector_is_left_as_it_was(head: bytes) -> None:
    def parse() -> None:
        try:
            parse_header(head, 8 + len(head), "m")
        except CheckpointError:
            assert head == b"{"

    assert gc.isenabled()
    parse()
    assert gc.isenabled()
    gc.disable()
    try:
        parse()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_file_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "nothing.safetensors")
