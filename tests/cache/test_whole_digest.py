"""Whole-file digests, as the Hugging Face hub publishes them: verified, and shared by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_hub import FakeHub
from support.models import PATIENT, assert_marks_are_true, small_model, stage_small, visible

from headrace.cache.errors import IntegrityError
from headrace.cache.origins.options import OriginOptions

MODEL = small_model()
SHARD = "model-00001-of-00002.safetensors"
LFS = sum(len(data) for path, data in MODEL.items() if path.endswith(".safetensors"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        fake.repository("models/org/name").commit(MODEL)
        yield fake


@pytest.fixture
def options(hub: FakeHub) -> OriginOptions:
    return replace(PATIENT, endpoint=hub.url)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_repository_is_staged_and_verified(hub: FakeHub, root: Path, options: OriginOptions) -> None:
    report = stage_small("hf://org/name", root, options=options)
    assert visible(root) == MODEL
    assert report.sources["origin"] == sum(map(len, MODEL.values()))


def test_bytes_that_do_not_have_the_published_digest_are_not_kept(
    hub: FakeHub, root: Path, options: OriginOptions
) -> None:
    wrong = bytearray(MODEL[SHARD])
    wrong[-5] ^= 1
    hub.damaged = {sha256(MODEL[SHARD]): bytes(wrong)}
    with pytest.raises(IntegrityError, match=rf"org/name/{SHARD} does not have the sha256"):
        stage_small("hf://org/name", root, options=options)
    assert visible(root) == {}
    assert_marks_are_true(root, MODEL)
    hub.damaged = {}
    stage_small("hf://org/name", root, options=options)
    assert visible(root) == MODEL


def test_another_repository_with_the_same_weights_costs_nothing(
    hub: FakeHub, root: Path, options: OriginOptions
) -> None:
    first = stage_small("hf://org/name", root, options=options)
    hub.repository("models/org/copy").commit({**MODEL, "config.json": b"{}"})
    second = stage_small("hf://org/copy", root, options=options)
    assert second.sources["origin"] == 2  # the configuration, which the hub gives no digest for
    assert second.snapshot != first.snapshot
    assert os.path.samefile(f"{first.path}/{SHARD}", f"{second.path}/{SHARD}")


def test_another_chunk_size_shares_the_same_file(hub: FakeHub, root: Path, options: OriginOptions) -> None:
    first = stage_small("hf://org/name", root, options=options)
    hub.repository("models/org/copy").commit({**MODEL, "config.json": b"{}"})
    second = stage_small("hf://org/copy", root, options=options, chunk=1 << 20)
    assert second.sources == {"origin": 2, "peer": 0, "local": LFS}
    assert os.path.samefile(f"{first.path}/{SHARD}", f"{second.path}/{SHARD}")


def test_a_commit_needs_no_second_question(hub: FakeHub, root: Path, options: OriginOptions) -> None:
    commit = hub.repository("models/org/name").refs["main"]
    stage_small(f"hf://org/name@{commit}", root, options=options)
    hub.repository("models/org/name").private = True
    assert stage_small(f"hf://org/name@{commit}", root, options=options).chunks == 0


def test_a_moved_branch_is_noticed_and_both_revisions_stay(
    hub: FakeHub, root: Path, options: OriginOptions
) -> None:
    old = stage_small("hf://org/name@main", root, options=options)
    hub.repository("models/org/name").commit({**MODEL, SHARD: small_model(1)[SHARD]})
    new = stage_small("hf://org/name@main", root, options=options)
    assert new.snapshot != old.snapshot
    assert Path(old.path, SHARD).read_bytes() == MODEL[SHARD]
    assert Path(new.path, SHARD).read_bytes() == small_model(1)[SHARD]
    other = "model-00002-of-00002.safetensors"
    assert os.path.samefile(f"{old.path}/{other}", f"{new.path}/{other}")
