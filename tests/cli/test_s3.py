"""The main job from a real S3 server: publish, stage, load, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from pathlib import Path

import pytest
from support.command import Command
from support.seaweedfs import SeaweedFS
from support.stores import read_files

pytestmark = pytest.mark.service


@pytest.fixture
def bucket(headrace: Command, seaweedfs: SeaweedFS) -> str:
    """A new bucket, with the credentials for it in the command's environment."""
    name = f"cli-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(seaweedfs.client()) as client:
        client.create_bucket(Bucket=name)
    headrace.environ |= seaweedfs.environ
    return name


def test_published_staged_and_loaded_it_is_the_same_model(
    headrace: Command, bucket: str, model: Path
) -> None:
    uri = f"s3://{bucket}/model"
    published = headrace("publish", model, uri, "--json").json
    assert published["uri"] == uri
    assert published["uploaded"] == published["bytes"] == sum(map(len, read_files(model).values()))
    from_folder = headrace("load", model, "--digest", "--json").json
    while_staging = headrace("load", uri, "--digest", "--json").json
    staged = headrace("stage", uri, "--json").json["snapshots"][0]
    assert sum(staged["sources"].values()) == 0
    from_store = headrace("load", staged["path"], "--digest", "--json").json
    again = headrace("load", uri, "--digest", "--explain", "--read-path", "buffered", "--json").json
    assert from_folder["digest"] == while_staging["digest"] == from_store["digest"] == again["digest"]
    assert again["read_path"] == "buffered"
    assert while_staging["snapshot"] == staged["snapshot"]
    assert while_staging["tensors"] == 24
    assert while_staging["bytes"] > 0
    assert while_staging["gigabytes_per_second"] > 0
    assert {span["name"] for span in while_staging["trace"]} >= {"resolve", "header"}
    assert headrace("show", uri, "--json").json["published"]


def test_only_named_tensors_are_loaded(headrace: Command, model: Path) -> None:
    loaded = headrace("load", model, "--pattern", "layers.1.*", "--name", "layers.2.0.weight", "--json").json
    assert loaded["tensors"] == 13
    assert "digest" not in loaded


def test_signed_models_only(headrace: Command, bucket: str, model: Path, tmp_path: Path) -> None:
    key, other = tmp_path / "key.pem", tmp_path / "other.pem"
    for file in (key, other):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", file], check=True)
    signed, plain = f"s3://{bucket}/signed", f"s3://{bucket}/plain"
    public = headrace("publish", model, signed, "--sign", key, "--json").json["key"]
    headrace("publish", model, plain)
    headrace("stage", signed, "--require", "signed", "--key", public)
    assert headrace("stage", plain, "--require", "signed", "--key", public, "--json", code=22).json["error"]
    wrong = headrace("publish", model, f"s3://{bucket}/other", "--sign", other, "--json").json["key"]
    assert wrong != public
    headrace("stage", f"s3://{bucket}/other", "--require", "signed", "--key", public, code=22)
    assert headrace("show", signed, "--json").json["signed"]


def test_an_unpublished_model_can_be_refused(headrace: Command, model: Path) -> None:
    assert "publish" in headrace("stage", model, "--require", "published", code=21).err


def test_a_prefix_without_anything_is_not_found(headrace: Command, bucket: str) -> None:
    assert f"s3://{bucket}/nothing" in headrace("stage", f"s3://{bucket}/nothing", code=11).err


def test_a_bucket_that_is_not_there_is_not_found(headrace: Command, bucket: str) -> None:
    headrace("stage", f"s3://{bucket}-missing/model", code=11)


def test_wrong_credentials_are_refused_and_never_shown(headrace: Command, bucket: str) -> None:
    headrace.environ["AWS_SECRET_ACCESS_KEY"] = "wrong-and-secret"
    result = headrace("stage", f"s3://{bucket}/model", "--json", code=12)
    assert "wrong-and-secret" not in result.out + result.err


def test_what_is_staged_serves_while_the_origin_is_down(
    headrace: Command, bucket: str, model: Path, seaweedfs: SeaweedFS
) -> None:
    uri = f"s3://{bucket}/model"
    headrace("publish", model, uri)
    headrace("stage", uri)
    headrace.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    served = headrace("stage", uri, "--json")
    assert any("cannot be reached" in note for note in served.json["snapshots"][0]["notes"])
    assert "cannot be reached" in served.err
    headrace("stage", f"s3://{bucket}/other", code=13)
