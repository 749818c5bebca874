"""A store with something in it, and a peer server over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peers import KEYS, Held, held, store_in

from headrace.cache.peers.server import PeerServer
from headrace.cache.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with store_in(tmp_path) as opened:
        yield opened


@pytest.fixture
def one(store: Store) -> Iterator[Held]:
    """A file of which nothing is there yet."""
    made = held(store)
    made.create()
    yield made
    made.close()


@pytest.fixture
def server(store: Store) -> Iterator[PeerServer]:
    with PeerServer(store, KEYS, node="node-1") as running:
        yield running


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that tests only read."""
    with store_in(tmp_path_factory.mktemp("shelf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def small(shelf: Store) -> Held:
    """A complete object of it."""
    made = held(shelf)
    made.fill()
    made.complete()
    return made


@pytest.fixture(scope="module")
def large(shelf: Store) -> Held:
    """A complete object that is more than the buffers of two sockets hold."""
    made = held(shelf, (16 << 20, 16 << 20), seed=7, name="large.bin")
    made.fill()
    made.complete()
    return made
