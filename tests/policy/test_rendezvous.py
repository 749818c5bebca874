"""Owners by rendezvous hashing."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from headrace.cache.policy.rendezvous import owner, owners

NODES = [f"node-{number}" for number in range(10)]


@given(st.integers(0, 1 << 30), st.permutations(NODES))
def test_every_node_works_out_the_same_order(chunk: int, nodes: list[str]) -> None:
    assert owners("s", chunk, nodes) == owners("s", chunk, NODES)
    assert owner("s", chunk, nodes) == owners("s", chunk, NODES)[0]
    assert owners("s", chunk, nodes, most=3) == owners("s", chunk, NODES)[:3]


@given(st.integers(0, 1 << 30), st.sampled_from(NODES))
def test_who_leaves_changes_only_what_it_owned(chunk: int, gone: str) -> None:
    before = owners("s", chunk, NODES)
    assert owners("s", chunk, [node for node in NODES if node != gone]) == [n for n in before if n != gone]


def test_chunks_are_spread_evenly() -> None:
    counts = Counter(owner("s", chunk, NODES) for chunk in range(10_000))
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_snapshots_have_owners_of_their_own() -> None:
    assert [owner("s", chunk, NODES) for chunk in range(50)] != [
        owner("t", chunk, NODES) for chunk in range(50)
    ]


def test_without_nodes_there_is_no_owner() -> None:
    assert owner("s", 1, []) is None
    assert owners("s", 1, []) == []
