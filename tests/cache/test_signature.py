"""What an origin must offer is required: a published manifest, or one signed by a trusted key."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.faulty_server import FaultyServer
from support.models import manifest_of, small_model, stage_small, visible

from headrace.cache import manifest, signature
from headrace.cache.errors import (
    HeadraceError,
    ManifestError,
    OriginUnavailable,
    SignatureError,
    UnsafePath,
    UsageError,
)
from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.publish import publish

CHUNK = 64 * 1024
MODEL = small_model()


def private_pem(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def public_hex(path: Path) -> str:
    """The key as a publisher would hand it out, derived by another program's rules than ours."""
    answer = subprocess.run(
        ["openssl", "pkey", "-in", str(path), "-pubout", "-outform", "DER"], capture_output=True, check=True
    )
    return answer.stdout[-32:].hex()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return private_pem(tmp_path / "publisher.pem")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for path, data in MODEL.items():
        (target / path).write_bytes(data)
    return target


@pytest.fixture
def signed(folder: Path, tmp_path: Path, key: Path) -> Path:
    publish(folder, str(tmp_path / "signed"), chunk=CHUNK, sign=key)
    return tmp_path / "signed"


def rewrite(origin: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = origin / PUBLISHED_NAME
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def refused(tmp_path: Path, origin: Path, kind: type[HeadraceError], says: str, **request: Any) -> None:
    """Staging ends in one sentence, and nothing can be opened or lies outside of the store."""
    before = {p for p in tmp_path.rglob("*") if tmp_path / "store" not in p.parents}
    with pytest.raises(kind, match=says) as caught:
        stage_small(str(origin), tmp_path / "store", **request)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path / "store") == {}
    after = {p for p in tmp_path.rglob("*") if tmp_path / "store" not in p.parents}
    assert after - before <= {tmp_path / "store"}


def test_what_a_trusted_key_signed_is_staged(signed: Path, tmp_path: Path, key: Path) -> None:
    stage_small(str(signed), tmp_path / "store", require="signed", keys=(public_hex(key),))
    assert visible(tmp_path / "store") == MODEL


def test_keys_made_by_openssl_sign_and_verify(folder: Path, tmp_path: Path) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    report = publish(folder, str(tmp_path / "out"), chunk=CHUNK, sign=key)
    assert report.key == public_hex(key)
    stage_small(str(tmp_path / "out"), tmp_path / "store", require="signed", keys=(str(public),))
    assert visible(tmp_path / "store") == MODEL


def test_a_signature_can_be_added_later_and_stays_when_nothing_changes(folder: Path, tmp_path: Path) -> None:
    keys = [private_pem(tmp_path / "one.pem"), private_pem(tmp_path / "two.pem")]
    out = str(tmp_path / "out")
    digests = {publish(folder, out, chunk=CHUNK, sign=key).digest for key in (None, *keys, None)}
    assert len(digests) == 1
    parsed = manifest.parse((tmp_path / "out" / PUBLISHED_NAME).read_bytes(), "here")
    assert [s.key for s in parsed.signatures] == [public_hex(key) for key in keys]
    for one in keys:
        assert signature.verify(parsed, [public_hex(one)], "here") == public_hex(one)


def test_without_a_manifest_a_stricter_origin_is_refused(folder: Path, tmp_path: Path, key: Path) -> None:
    refused(tmp_path, folder, ManifestError, "requires a published manifest", require="published")
    refused(tmp_path, folder, SignatureError, "signed manifest", require="signed", keys=(public_hex(key),))


def test_an_unsigned_manifest_is_refused(folder: Path, tmp_path: Path, key: Path) -> None:
    publish(folder, str(tmp_path / "out"), chunk=CHUNK)
    refused(
        tmp_path,
        tmp_path / "out",
        SignatureError,
        "is not signed",
        require="signed",
        keys=(public_hex(key),),
    )


def test_a_signature_by_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = public_hex(private_pem(tmp_path / "other.pem"))
    refused(tmp_path, signed, SignatureError, "none of the 1 trusted keys", require="signed", keys=(other,))


def swap_chunk(content: dict[str, Any]) -> None:
    chunks = content["manifest"]["files"][1]["chunks"]
    chunks[0], chunks[1] = chunks[1], chunks[0]


def drop_file(content: dict[str, Any]) -> None:
    del content["manifest"]["files"][0]


def name_predecessor(content: dict[str, Any]) -> None:
    content["manifest"]["predecessor"] = "sha256:" + "0" * 64


def other_value(content: dict[str, Any]) -> None:
    content["signatures"][0]["value"] = "00" * 64


def short_value(content: dict[str, Any]) -> None:
    content["signatures"][0]["value"] = "zz"


@pytest.mark.parametrize("change", [swap_chunk, drop_file, name_predecessor, other_value, short_value])
def test_a_manifest_altered_after_it_was_signed_is_refused(
    signed: Path, tmp_path: Path, key: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(signed, change)
    refused(tmp_path, signed, SignatureError, "altered", require="signed", keys=(public_hex(key),))


def test_bytes_altered_after_publishing_are_refused(signed: Path, tmp_path: Path, key: Path) -> None:
    data = bytearray(MODEL["model-00001-of-00002.safetensors"])
    data[-1] ^= 1
    (signed / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(HeadraceError, match="digest"):
        stage_small(str(signed), tmp_path / "store", require="signed", keys=(public_hex(key),))
    assert "model-00001-of-00002.safetensors" not in visible(tmp_path / "store")


def path_of(first: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["manifest"]["files"][0]["path"] = first

    return change


def duplicate(content: dict[str, Any]) -> None:
    content["manifest"]["files"].insert(0, content["manifest"]["files"][0])


def size_of(size: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["manifest"]["files"][0]["size"] = size

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (path_of("../../outside"), r"\.\."),
        (path_of("/etc/passwd"), "absolute"),
        (path_of("nul\0byte"), "control"),
        (path_of("back\\slash"), "backslash"),
        (path_of("MODEL-00001-of-00002.safetensors"), "case or Unicode"),
        (path_of("model-00001-of-00002.safetensors/config.json"), "both as a file and as a folder"),
        (path_of(""), "empty"),
        (path_of("x" * 300), "longer than"),
        (path_of("\udc80"), "Unicode"),
        (duplicate, "twice"),
        (size_of(1 << 60), "which no model file has"),
        (size_of(-1), "which no model file has"),
    ],
)
@pytest.mark.parametrize("require", [None, "published"])
def test_a_manifest_with_unsafe_paths_or_sizes_is_refused(
    signed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str, require: str | None
) -> None:
    rewrite(signed, change)
    refused(tmp_path, signed, UnsafePath, says, require=require)


def test_what_was_staged_before_does_not_satisfy_a_stricter_requirement(
    folder: Path, tmp_path: Path, key: Path
) -> None:
    """Even where the reference would be believed for ever, and again once it is signed."""
    store, trusted = tmp_path / "store", (public_hex(key),)
    stage_small(str(folder), store)
    with pytest.raises(ManifestError):
        stage_small(str(folder), store, revalidate="never", require="published")
    publish(folder, str(folder), chunk=CHUNK)
    assert stage_small(str(folder), store, revalidate="never", require="published").sources["origin"] == 0
    with pytest.raises(SignatureError, match="not signed"):
        stage_small(str(folder), store, revalidate="never", require="signed", keys=trusted)
    publish(folder, str(folder), chunk=CHUNK, sign=key)
    report = stage_small(str(folder), store, revalidate="never", require="signed", keys=trusted)
    assert report.sources["origin"] == 0
    # Now the store itself knows a signed manifest, and the origin is not asked.
    (folder / PUBLISHED_NAME).unlink()
    stage_small(str(folder), store, revalidate="never", require="signed", keys=trusted)


def test_a_signed_selection_serves_with_the_origin_down(folder: Path, tmp_path: Path, key: Path) -> None:
    """The signature is over the whole manifest, of which only a part is staged."""
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    publish(folder, str(tmp_path / "out"), chunk=CHUNK, sign=key)
    files = {f"m/{p.name}": p.read_bytes() for p in (tmp_path / "out").iterdir()}
    store, trusted = tmp_path / "store", (public_hex(key),)
    with FaultyServer(files) as server:
        reference = f"{server.url}/m"
        stage_small(reference, store, require="signed", keys=trusted)
        # Asking for less in between forgets nothing.
        stage_small(reference, store)
    stage_small(reference, store, require="signed", keys=trusted)
    assert visible(store) == MODEL
    with pytest.raises(OriginUnavailable):
        stage_small(reference, store, require="signed", keys=(public_hex(private_pem(tmp_path / "x.pem")),))


def test_the_same_revision_unsigned_elsewhere_takes_no_signature_away(
    folder: Path, tmp_path: Path, key: Path
) -> None:
    root = tmp_path / "store"
    signed = manifest_of(small_model())
    unsigned = {**small_model(), PUBLISHED_NAME: signed.to_published()}
    named = {**small_model(), PUBLISHED_NAME: signature.sign(signed, key).to_published()}
    with FaultyServer({f"m/{path}": data for path, data in named.items()}) as server:
        url = f"{server.url}/m"
        stage_small(url, root)
        with FaultyServer({f"m/{path}": data for path, data in unsigned.items()}) as other:
            stage_small(f"{other.url}/m", root)
    report = stage_small(url, root, require="signed", keys=(public_hex(key),))
    assert report.chunks == 0


def test_an_origin_cannot_claim_that_its_manifest_was_verified(
    signed: Path, tmp_path: Path, key: Path
) -> None:
    def claim(content: dict[str, Any]) -> None:
        content["source"] = {"signed_by": public_hex(key), "published": True}
        content["signatures"] = []

    rewrite(signed, claim)
    stage_small(str(signed), tmp_path / "store")
    with pytest.raises(SignatureError, match="not signed"):
        stage_small(
            str(signed), tmp_path / "store", revalidate="never", require="signed", keys=(public_hex(key),)
        )


def test_the_configuration_requires_and_a_request_cannot_ask_for_less(
    folder: Path, signed: Path, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'[[origin]]\nprefix = "file://{tmp_path}/"\nrequire = "signed"\nkeys = ["{public_hex(key)}"]\n'
    )
    monkeypatch.setenv("HEADRACE_CONFIG", str(config))
    with pytest.raises(SignatureError):
        stage_small(str(folder), tmp_path / "store", require="published")
    stage_small(str(signed), tmp_path / "store")
    assert visible(tmp_path / "store") == MODEL


def test_a_signature_covers_each_part_of_what_a_publisher_says(key: Path) -> None:
    one = signature.sign(manifest_of(MODEL), key)
    trusted = [public_hex(key)]
    assert signature.verify(one, trusted, "here") == trusted[0]
    # Where the bytes were found is no part of it.
    signature.verify(one.pinned({}, "s3://elsewhere/model", "rev"), trusted, "here")
    first = one.files[0]
    for altered in (
        replace(one, algorithm="blake3"),
        replace(one, predecessor="sha256:" + "1" * 64),
        replace(one, files=one.files[1:]),
        replace(one, files=(replace(first, path="other.json"), *one.files[1:])),
        replace(one, files=(replace(first, digest=None), *one.files[1:])),
        replace(one, files=(replace(first, chunks=None), *one.files[1:])),
    ):
        with pytest.raises(SignatureError, match="altered"):
            signature.verify(altered, trusted, "here")


def test_unusable_private_keys_are_refused(tmp_path: Path) -> None:
    one = manifest_of(MODEL)
    locked, rsa, text = tmp_path / "locked.pem", tmp_path / "rsa.pem", tmp_path / "text.pem"
    locked.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
    )
    rsa.write_bytes(
        generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    text.write_text("hello")
    for path in (locked, rsa, text, tmp_path / "missing.pem"):
        with pytest.raises(UsageError, match=path.name):
            signature.sign(one, path)


def test_trusted_keys_are_hex_or_pem_of_ed25519(tmp_path: Path, key: Path) -> None:
    assert signature.public_key(public_hex(key).upper()) == public_hex(key)
    rsa = tmp_path / "rsa-public.pem"
    rsa.write_bytes(
        generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    for text in ("g" * 64, "", str(rsa), str(key)):
        with pytest.raises(UsageError, match="key"):
            signature.public_key(text)
