"""Nodes for the tests of one staging run in a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.swarm import Node, SharedSwarms

Make = Callable[..., Node]


@pytest.fixture
def swarms() -> SharedSwarms:
    return SharedSwarms()


@pytest.fixture
def make(tmp_path: Path, swarms: SharedSwarms) -> Iterator[Make]:
    """Another node, running."""
    with ExitStack() as stack:
        count = 0

        def one(**how: Any) -> Node:
            nonlocal count
            count += 1
            return stack.enter_context(Node(tmp_path / f"node{count}", swarms, **how))

        yield one
