"""Azure Blob Storage through obstore, against Azurite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from support import azurite
from support.origin_contract import OriginContract, RawOrigin

from headrace.cache.origins.options import OriginOptions

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not azurite.installed(), reason="Azurite is not installed (make setup)"),
]
_containers = itertools.count()


class RawAzure(RawOrigin):
    def __init__(self, server: azurite.Azurite) -> None:
        self._server = server
        self._container = f"test-{next(_containers)}"
        server.create_container(self._container)

    def put(self, path: str, data: bytes) -> None:
        self._server.put(self._container, path, data)

    def get(self, path: str) -> bytes:
        return self._server.get(self._container, path)

    def delete(self, path: str) -> None:
        self._server.delete(self._container, path)

    def uri(self, path: str) -> str:
        return f"az://{self._container}/{path}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[azurite.Azurite]:
    with azurite.Azurite(tmp_path_factory.mktemp("azurite")) as running:
        yield running


class TestAzure(OriginContract):
    @pytest.fixture
    def raw(self, server: azurite.Azurite) -> RawOrigin:
        return RawAzure(server)

    @pytest.fixture
    def options(self, server: azurite.Azurite, monkeypatch: pytest.MonkeyPatch) -> OriginOptions:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", azurite.ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azurite.KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.endpoint)
        return OriginOptions.from_env("az")
