"""Secrets and certificates: read from files, never shown, and demanded beyond loopback."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.certificates import Authority

from headrace.cache.errors import NotAuthenticated
from headrace.cache.peers.security import Security, SecurityFiles

SECRET = "correct horse battery staple"
OLDER = "an older secret of the node"


def secrets(tmp_path: Path, *lines: str) -> SecurityFiles:
    file = tmp_path / "secret"
    file.write_text("\n".join(lines))
    return SecurityFiles({"default": str(file)})


def test_the_first_line_of_a_file_signs_and_all_are_accepted(tmp_path: Path) -> None:
    loaded = secrets(tmp_path, "# rotated on Monday", "", SECRET, OLDER, SECRET).load()
    ids = [s.id for s in loaded.secrets["default"]]
    assert len(ids) == 2
    signing = loaded.signing("default")
    assert signing is not None
    assert signing.id == ids[0] == Security.shared(default=SECRET).secrets["default"][0].id


def test_nothing_that_can_be_printed_shows_a_secret(tmp_path: Path) -> None:
    loaded = secrets(tmp_path, SECRET).load()
    for shown in (loaded, loaded.secrets["default"], secrets(tmp_path, SECRET)):
        assert SECRET not in repr(shown)
        assert SECRET not in str(shown)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no secret in it"),
        (b"# only a comment\n\n", "no secret in it"),
        (b"short\n", "shorter than 16"),
        (b"long enough to be one\nno\n", "shorter than 16"),
        (b"\xff\xfe\x00binary\x00", "is not text"),
        (b"x" * 70_000, "larger than"),
    ],
)
def test_a_secret_file_that_cannot_be_meant_is_refused_without_quoting_it(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(NotAuthenticated, match=said) as caught:
        SecurityFiles({"default": str(tmp_path / "secret")}).load()
    assert str(tmp_path / "secret") in str(caught.value)
    assert "long enough" not in str(caught.value)


def test_a_missing_secret_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotAuthenticated, match=r"nowhere.*cannot be read"):
        SecurityFiles({"default": str(tmp_path / "nowhere")}).load()


def test_the_files_can_be_written_as_json(tmp_path: Path) -> None:
    files = secrets(tmp_path, SECRET)
    assert SecurityFiles(**json.loads(json.dumps(dataclasses.asdict(files)))) == files


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_secret(host: str) -> None:
    Security().check_listen(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.5", "node-3", "127.0.0.1.example.com", "fe80::1%eth0"]
)
def test_beyond_loopback_a_secret_or_certificates_are_demanded(host: str) -> None:
    with pytest.raises(NotAuthenticated, match="refusing to listen"):
        Security().check_listen(host)
    Security.shared(default=SECRET).check_listen(host)
    Security(tls=SecurityFiles(ca="a", certificate="b", key="c")).check_listen(host)


def test_a_seal_holds_for_what_was_sealed_in_its_domain_only() -> None:
    ours, theirs = Security.shared(default=SECRET, tenant=OLDER), Security.shared(default=OLDER)
    seal = ours.seal("default", b"key", b"value")
    assert ours.sealed("default", seal, b"key", b"value")
    assert not ours.sealed("default", seal, b"keyv", b"alue")
    assert not ours.sealed("tenant", seal, b"key", b"value")
    assert not theirs.sealed("default", seal, b"key", b"value")
    for broken in (b"", seal[:-1], seal + b"x", bytes(len(seal))):
        assert not ours.sealed("default", broken, b"key", b"value")


def test_a_seal_of_the_secret_before_holds_until_it_is_taken_out(tmp_path: Path) -> None:
    before = Security.shared(default=OLDER).seal("default", b"value")
    assert secrets(tmp_path, SECRET, OLDER).load().sealed("default", before, b"value")
    assert not secrets(tmp_path, SECRET).load().sealed("default", before, b"value")


@pytest.mark.parametrize("missing", ["ca", "certificate", "key"])
def test_mutual_tls_needs_all_its_files(tmp_path: Path, missing: str) -> None:
    whole = Authority.make(tmp_path / "ca").node("node")
    whole.load()
    (tmp_path / "garbage").write_text("not a certificate")
    files = {"ca": whole.ca, "certificate": whole.certificate, "key": whole.key}
    for wrong, said in (
        (None, "all three"),
        (str(tmp_path / "nowhere"), "cannot be read"),
        (str(tmp_path / "garbage"), r"\(PEM\)"),
    ):
        with pytest.raises(NotAuthenticated, match=said):
            SecurityFiles({}, **{**files, missing: wrong}).load()


def test_a_certificate_with_another_nodes_key_is_refused(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    mixed = dataclasses.replace(authority.node("one"), key=authority.node("two").key)
    with pytest.raises(NotAuthenticated, match="not a pair"):
        mixed.load()
