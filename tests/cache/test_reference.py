"""References parse to one canonical form, and typos end in a suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cache.errors import UsageError
from headrace.cache.origins import open_origin
from headrace.cache.reference import parse


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("s3://bucket/llama", "s3://bucket/llama"),
        ("S3://bucket/llama/", "s3://bucket/llama"),
        ("s3a://bucket/llama", "s3://bucket/llama"),
        ("s3://bucket/odd@name", "s3://bucket/odd@name"),
        ("gcs://bucket/x", "gs://bucket/x"),
        ("abfss://container/x", "az://container/x"),
        ("https://host:8080/a/b/", "https://host:8080/a/b"),
        ("hf://org/name", "hf://org/name"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("hf://org/name@refs/pr/3", "hf://org/name@refs/pr/3"),
        ("huggingface://org/name@v1", "hf://org/name@v1"),
        ("file:///models/a", "file:///models/a"),
        ("file:///models/a%20b", "file:///models/a b"),
        ("/models/a/", "file:///models/a"),
        ("memory://model", "memory://model"),
    ],
)
def test_the_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


def test_a_revision_is_no_part_of_the_uri() -> None:
    reference = parse("hf://org/name@abc/sub")
    assert (reference.uri, reference.revision) == ("hf://org/name/sub", "abc")


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("model").location == str(tmp_path / "model")
    assert parse("~/model").location == str(Path("~/model").expanduser())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a model reference"),
        (" s3://a/b", "not a model reference"),
        ("s3://a/b\n", "not a model reference"),
        ("s3://a\0/b", "control characters"),
        ("s3:bucket/x", r"did you mean s3://bucket/x\?"),
        ("s3://", "names no bucket"),
        ("https:///path", "names no bucket"),
        ("hf://org/name@", "without a revision"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(text)


@pytest.mark.parametrize(("typo", "meant"), [("s4", "s3"), ("htp", "http"), ("hff", "hf"), ("gss", "gs")])
def test_a_typo_in_the_scheme_ends_in_a_suggestion(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"{typo}://.*Did you mean {meant}"):
        open_origin(parse(f"{typo}://bucket/model"))
