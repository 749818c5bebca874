"""Everything here runs in network namespaces of its own, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.namespaces import Network, Rate, missing
from support.origin import Origin


@pytest.fixture
def network() -> Iterator[Network]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Network() as made:
        yield made


@pytest.fixture
def origin(network: Network, tmp_path: Path) -> Iterator[Origin]:
    with Origin(network.add("origin", Rate(800, 800)), tmp_path / "origin") as started:
        yield started
