"""A real S3 server for the tests here that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.seaweedfs import SeaweedFS


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One S3 server for the session; each test takes a bucket of its own."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server
