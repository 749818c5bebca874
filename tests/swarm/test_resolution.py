"""What nodes tell each other of a reference is checked again, as far as it can be; the origin's word counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from support.faulty_server import FaultyServer
from support.models import CHUNK, below, small_model
from support.swarm import SharedSwarms
from swarm.conftest import Make

from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.publish import publish
from headrace.cache.snapshot import Selection

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))
PART = Selection(include=("*-00001-*",))


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, str]:
    """A folder that was published with a signature, and the key that is to be trusted."""
    key = Ed25519PrivateKey.generate()
    pem = tmp_path / "publisher.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    source = tmp_path / "model"
    source.mkdir()
    for path, data in MODEL.items():
        (source / path).write_bytes(data)
    publish(source, str(tmp_path / "published" / "model"), chunk=CHUNK, sign=pem)
    return tmp_path / "published", key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def shared_values(swarms: SharedSwarms) -> dict[str, dict[str, Any]]:
    """What the nodes remember of references, by key."""
    found = {}
    for key, (value, _, _) in list(swarms._values.items()):
        try:
            parsed = json.loads(value)
        except ValueError:
            continue
        if isinstance(parsed, dict) and "skipped" in parsed:
            found[key] = parsed
    return found


@pytest.mark.parametrize("selection", [Selection(), PART], ids=["all", "part"])
def test_a_required_signature_is_checked_without_the_origin(
    make: Make, signed: tuple[Path, str], selection: Selection
) -> None:
    folder, key = signed
    request: dict[str, Any] = {"require": "signed", "keys": (key,), "selection": selection}
    with FaultyServer(directory=folder) as server:
        make().stage(f"{server.url}/model", **request)
        server.clear()
        node = make()
        report = node.stage(f"{server.url}/model", revalidate="1h", **request)
        assert server.requests("*") == []
        assert report.notes == ()
        assert node.files() == {p: d for p, d in MODEL.items() if selection != PART or "-00001-" in p}


def test_an_answer_is_believed_for_as_long_as_who_asks_now_says(make: Make, swarms: SharedSwarms) -> None:
    """The first believes its own for no time at all; the cluster has forgotten that it was waited for."""
    with FaultyServer(below("model", MODEL)) as server:
        make().stage(f"{server.url}/model", revalidate="always")
        for key in [key for key in swarms._values if not key.endswith(" last")]:
            del swarms._values[key]
        server.clear()
        make().stage(f"{server.url}/model", revalidate="1h")
        assert server.requests("*") == []
        make().stage(f"{server.url}/model", revalidate="always")
        assert server.requests("*") != []


@pytest.mark.parametrize("selection", [Selection(), PART], ids=["all", "part"])
@pytest.mark.parametrize("change", ["bytes", "unsigned", "other file", "nonsense"])
def test_what_is_not_what_was_signed_is_asked_of_the_origin_again(
    make: Make, swarms: SharedSwarms, signed: tuple[Path, str], selection: Selection, change: str
) -> None:
    folder, key = signed
    request: dict[str, Any] = {"require": "signed", "keys": (key,), "selection": selection}
    with FaultyServer(directory=folder) as server:
        make().stage(f"{server.url}/model", **request)
        for name, value in shared_values(swarms).items():
            manifest = json.loads(value["manifest"])
            entry = next(f for f in manifest["manifest"]["files"] if "-00001-" in f["path"])
            if change == "bytes":
                entry["chunks"][0] = "0" * len(entry["chunks"][0])
            elif change == "unsigned":
                manifest["signatures"], value["whole"] = [], None
            elif change == "other file":
                entry["path"] = "model-00001-of-00003.safetensors"
            value["manifest"] = "nonsense" if change == "nonsense" else json.dumps(manifest)
            swarms.remember(name, json.dumps(value).encode(), 3600.0, time.monotonic())
        server.clear()
        node = make()
        report = node.stage(f"{server.url}/model", revalidate="1h", **request)
        assert len(server.requests(f"model/{PUBLISHED_NAME}")) == 1
        assert any("so the origin is asked again" in note for note in report.notes)
        assert node.files() == {p: d for p, d in MODEL.items() if selection != PART or "-00001-" in p}


def test_a_learned_digest_that_the_origin_contradicts_is_said(make: Make, swarms: SharedSwarms) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        make().stage(f"{server.url}/model")
        for swarm in swarms._swarms.values():
            swarm.digests.update(dict.fromkeys(swarm.digests, b"\x00" * 16))
        node = make()
        report = node.stage(f"{server.url}/model")
        assert node.files() == MODEL
        assert report.sources["origin"] == SIZE
        assert any("than the origin's bytes: the origin counts" in note for note in report.notes)


def test_nodes_that_ask_for_other_things_do_not_share_an_answer(make: Make) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        make().stage(f"{server.url}/model")
        other = make()
        report = other.stage(f"{server.url}/model", selection=PART, revalidate="1h")
        assert report.files == 1
        assert len(server.requests("model/")) == 2
