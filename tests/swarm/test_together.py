"""Several nodes stage one model: each byte is read from the origin once, and every node ends with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.faulty_server import FaultyServer
from support.models import below, published, small_model
from support.swarm import Node, SharedSwarms, stage_together

from headrace.cache.manifest import PUBLISHED_NAME

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    with ExitStack() as stack:
        swarms = SharedSwarms()
        yield [stack.enter_context(Node(tmp_path / f"node{i}", swarms)) for i in range(4)]


def sent(server: FaultyServer) -> int:
    return sum(server.bytes_sent(f"model/{path}") for path in MODEL)


@pytest.mark.parametrize("vouched", [False, True], ids=["learned", "published"])
def test_nodes_that_start_together_read_each_byte_once(nodes: list[Node], vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    with FaultyServer(below("model", files), rate=2e7) as server:
        reports = stage_together(nodes, f"{server.url}/model")
        assert sent(server) == SIZE
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
            assert report.notes == ()
        assert sum(report.sources["origin"] for report in reports) == SIZE
        assert sum(report.sources["peer"] for report in reports) == 3 * SIZE


def test_nodes_that_start_together_ask_what_is_there_once(nodes: list[Node]) -> None:
    with FaultyServer(below("model", published(MODEL))) as server:
        stage_together(nodes, f"{server.url}/model")
        assert len(server.requests(f"model/{PUBLISHED_NAME}")) == 1
        for path in MODEL:
            assert len([r for r in server.requests(f"model/{path}", method="HEAD")]) == 1
