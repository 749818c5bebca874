"""Which adapter serves which scheme, what opening one imports, and what the environment sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cache import reference
from headrace.cache.errors import UsageError
from headrace.cache.origins import ADAPTERS, open_origin
from headrace.cache.origins.options import OriginOptions

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "cache")}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_scheme_of_a_reference_has_an_adapter() -> None:
    assert set(ADAPTERS) == set(reference.NATIVE_SCHEMES)


def test_importing_the_origins_imports_no_library() -> None:
    code = (
        "import sys, headrace.cache.origins, headrace.cache.origins.translate\n"
        "print(sorted({'obstore', 'fsspec', 'boto3', 'botocore', 'aiohttp', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize(
    ("library", "uri", "extra"), [("obstore", "s3://b/m", "cache"), ("obstore", "gs://b/m", "cache")]
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(library: str, uri: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from headrace.cache import errors, reference\n"
        "from headrace.cache.origins import open_origin\n"
        f"try: open_origin(reference.parse({uri!r}))\n"
        "except errors.MissingDependency as error: print(error)\n"
    )
    text = python(code)
    assert library in text
    assert f"pip install 'headrace[{extra}]'" in text


@pytest.mark.parametrize(("scheme", "meant"), [("s4", "s3"), ("htps", "https"), ("oos", "oss")])
def test_a_typo_in_the_scheme_gets_a_suggestion(scheme: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {meant}://"):
        open_origin(reference.parse(f"{scheme}://bucket/model"))


def test_the_endpoint_of_the_service_comes_before_the_general_one() -> None:
    env = {"AWS_ENDPOINT_URL": "http://general", "AWS_ENDPOINT_URL_S3": "http://service"}
    assert OriginOptions.from_env("s3", env).endpoint == "http://service"
    assert OriginOptions.from_env("gs", env).endpoint is None


def test_the_environment_of_one_cloud_does_not_touch_another() -> None:
    env = {
        "AWS_REGION": "eu-west-1",
        "AWS_PROFILE": "me",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_CA_BUNDLE": "ca",
    }
    s3, gs = OriginOptions.from_env("s3", env), OriginOptions.from_env("gs", env)
    assert (s3.region, s3.profile, s3.anonymous, s3.ca_bundle) == ("eu-west-1", "me", True, "ca")
    assert gs == OriginOptions()


def test_the_proxy_is_the_one_for_the_endpoints_scheme() -> None:
    env = {
        "HTTPS_PROXY": "http://secure",
        "http_proxy": "http://plain",
        "HTTP_PROXY": "http://forged",
        "NO_PROXY": "h",
    }
    assert OriginOptions.from_env("s3", env).proxy == "http://secure"
    assert OriginOptions.from_env("http", env).proxy == "http://plain"
    assert OriginOptions.from_env("s3", env | {"AWS_ENDPOINT_URL": "http://h:1"}).proxy == "http://plain"
    assert OriginOptions.from_env("http", {"HTTP_PROXY": "http://forged"}).proxy is None
    assert OriginOptions.from_env("https", env).no_proxy == "h"


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"connect_timeout": 0}, {"stall_timeout": -1}, {"backoff_base": -1}]
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        OriginOptions(**options)  # type: ignore[arg-type]
