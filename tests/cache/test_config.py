"""The configuration file says where the store is and what origins must offer; every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.models import small_model, visible

from headrace.cache import config
from headrace.cache.config import Config
from headrace.cache.errors import ManifestError, UsageError
from headrace.cache.reference import parse
from headrace.cache.resolve import Requirement
from headrace.cache.staging import stage

KEY = "ab" * 32


def loaded(tmp_path: Path, text: str) -> Config:
    (tmp_path / "config.toml").write_text(text)
    return config.load(str(tmp_path / "config.toml"))


def test_every_key_is_optional(tmp_path: Path) -> None:
    assert loaded(tmp_path, "") == Config()


def test_every_key_is_read(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        f'''
        root = "/srv/models"
        domain = "team"
        revalidate = "10m"
        workers = 3

        [[origin]]
        prefix = "s3://prod/"
        require = "signed"
        keys = ["{KEY.upper()}"]
        endpoint = "https://minio.example:9000"
        region = "eu-central-1"
        ''',
    )
    assert (found.root, found.domain, found.revalidate, found.workers) == ("/srv/models", "team", "10m", 3)
    rule = found.rule(parse("s3://prod/llama"))
    assert rule.requirement == Requirement("signed", (KEY,))
    options = found.options(parse("s3://prod/llama"))
    assert (options.endpoint, options.region) == ("https://minio.example:9000", "eu-central-1")


def test_keys_may_be_pem_files(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate().public_key()
    pem = tmp_path / "publisher.pem"
    pem.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    found = loaded(tmp_path, f'[[origin]]\nprefix = "s3://"\nrequire = "signed"\nkeys = ["{pem}"]')
    assert found.origins[0].requirement.keys == (key.public_bytes_raw().hex(),)


def test_the_longest_fitting_prefix_counts(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        """
        [[origin]]
        prefix = "s3://prod/models/secret"
        require = "published"
        [[origin]]
        prefix = "s3://prod/"
        region = "eu-west-1"
        """,
    )
    assert found.rule(parse("s3://prod/models/secret")).requirement.level == "published"
    assert found.rule(parse("s3://prod/models/secret/7b")).requirement.level == "published"
    assert found.rule(parse("s3://prod/models")).options == {"region": "eu-west-1"}
    assert found.rule(parse("s3://prod")).options == {"region": "eu-west-1"}
    assert found.rule(parse("s3://production/models")).prefix == ""
    assert found.rule(parse("gs://prod/models")).requirement.level is None


def test_the_file_is_laid_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    found = loaded(tmp_path, '[[origin]]\nprefix = "s3://prod/"\nregion = "eu-west-1"')
    options = found.options(parse("s3://prod/m"))
    assert (options.endpoint, options.region) == ("http://127.0.0.1:9", "eu-west-1")
    assert found.options(parse("s3://other/m")).region == "us-east-2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rot = 1", "no setting 'rot'"),
        ("root = 1", "'root' has to be str"),
        ('workers = "two"', "'workers' has to be int"),
        ('revalidate = "sometimes"', "always, never, or an age"),
        ("[origin]\nprefix = 's3://'", r"\[\[origin\]\]"),
        ("[[origin]]\nrequire = 'signed'", "lacks its prefix"),
        ("[[origin]]\nprefix = 's3://'\nrequire = 'verified'", "'published' or 'signed'"),
        ("[[origin]]\nprefix = 's3://'\nrequire = 'signed'", "names no keys"),
        ("[[origin]]\nprefix = 's3://'\nregoin = 'eu'", "unknown setting 'regoin'"),
        ("[[origin]]\nprefix = 's3://'\nkeys = ['short']", "neither a public key"),
        ("root = ", "cannot be read"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        loaded(tmp_path, text)


def test_a_named_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(str(tmp_path / "missing.toml"))
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(environ={"HEADRACE_CONFIG": str(tmp_path / "missing.toml")})


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('domain = "team"')
    assert config.load(environ={"HEADRACE_CONFIG": str(tmp_path / "c.toml")}).domain == "team"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("always", 0.0), ("never", None), ("30s", 30.0), ("10m", 600.0), ("2h", 7200.0), ("7d", 604800.0)],
)
def test_ages_are_seconds(text: str, seconds: float | None) -> None:
    assert config.max_age(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "-1s", "1w", "1.5h", "s"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="revalidate"):
        config.max_age(text)


def test_staging_follows_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(tensors=2)
    for name in ("open", "strict"):
        (tmp_path / name).mkdir()
        for path, data in model.items():
            (tmp_path / name / path).write_bytes(data)
    (tmp_path / "config.toml").write_text(
        f'root = "{tmp_path}/store"\ndomain = "team"\nrevalidate = "never"\n'
        f'[[origin]]\nprefix = "file://{tmp_path}/strict"\nrequire = "published"\n'
    )
    monkeypatch.setenv("HEADRACE_CONFIG", str(tmp_path / "config.toml"))
    report = stage(str(tmp_path / "open"))
    assert Path(report.path).is_relative_to(tmp_path / "store" / "domains" / "team")
    assert visible(tmp_path / "store") == model
    # Never asked again: what changed at the origin is not noticed.
    (tmp_path / "open" / "config.json").write_bytes(b"{}")
    assert stage(str(tmp_path / "open")).snapshot == report.snapshot
    assert stage(str(tmp_path / "open"), revalidate="always").snapshot != report.snapshot
    with pytest.raises(ManifestError, match="requires a published manifest"):
        stage(str(tmp_path / "strict"))
