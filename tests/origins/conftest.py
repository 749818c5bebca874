"""Servers that several origin tests share, and an environment without anyone's credentials."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support import origin_contract
from support.seaweedfs import SeaweedFS

_FOREIGN = ("AWS_", "GOOGLE_", "AZURE_", "OSS_", "HF_", "STORAGE_EMULATOR_")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No variable and no file of the person who runs the tests decides what they see."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(params=origin_contract.WAYS)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads by either way that `origin_contract.read` knows."""
    monkeypatch.setattr(origin_contract, "way", request.param)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One S3 server for the session; each test takes a bucket of its own."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server
