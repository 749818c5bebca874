"""Everything here runs in network namespaces of its own, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import bed as beds
from support.bed import Bed, Make
from support.cluster import Cluster
from support.namespaces import Network, Rate
from support.origin import Origin


@pytest.fixture(scope="session")
def possible() -> None:
    if reason := beds.missing():
        pytest.skip(reason)


@pytest.fixture
def network(possible: None) -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture
def origin(network: Network, tmp_path: Path) -> Iterator[Origin]:
    with Origin(network.add("origin", Rate(800, 800)), tmp_path / "origin") as started:
        yield started


@pytest.fixture(scope="session")
def bed(possible: None) -> Iterator[Bed]:
    with beds.bed() as made:
        yield made


@pytest.fixture
def make(bed: Bed) -> Iterator[Make]:
    """Makes a cluster on the bed that ends with the test."""
    with ExitStack() as stack:

        def made(nodes: int = 4, **how: Any) -> Cluster:
            return stack.enter_context(bed.cluster(nodes, **how))

        yield made
