"""Nodes that share nothing: real peer servers are asked for real maps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.peers import KEYS, Held, held, store_in

from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.server import PeerServer
from headrace.cache.tracker.protocol import MAX_HOLDERS, Exchange, Peer, Swarm
from headrace.cache.tracker.without import Patience, PeerTracker

CHUNKS = 24
PATIENCE = 60.0
QUICK = Patience(fresh=0.02, wait=5.0, settle=0.0, silent=0.4, stuck=1.0, missing=0.1)


@dataclass
class Node:
    """A store with a peer server."""

    one: Held
    server: PeerServer
    peer: Peer


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Four; none of them has begun to stage the snapshot."""
    with ExitStack() as stack:
        made = []
        for i in range(4):
            store = stack.enter_context(store_in(tmp_path / f"n{i}"))
            one = held(store, [1000] * CHUNKS)
            stack.callback(one.close)
            server = stack.enter_context(PeerServer(store, KEYS, node=f"n{i}"))
            made.append(Node(one, server, Peer(f"n{i}", server.address)))
        yield made


def swarm_of(nodes: list[Node]) -> Swarm:
    return Swarm(nodes[0].one.snapshot, CHUNKS)


def with_trackers(
    nodes: list[Node],
    work: Callable[[list[PeerTracker]], Awaitable[None]],
    patience: Patience = QUICK,
    members: list[Peer] | None = None,
) -> None:
    async def run() -> None:
        client = PeerClient(KEYS, timeouts=PeerTimeouts(connect=1.0, first_byte=0.5))
        peers = members or [node.peer for node in nodes]
        trackers = [
            PeerTracker(node.peer, peers, client, node.one.domain, patience=patience, seed=i)
            for i, node in enumerate(nodes)
        ]
        try:
            await work(trackers)
        finally:
            for tracker in trackers:
                await tracker.close()
            await client.close()

    asyncio.run(run())


WANTED = Exchange(wanted=range(CHUNKS), claims=CHUNKS)
STUCK = (Patience(fresh=0.02, wait=5.0, settle=0.0, silent=60.0, stuck=0.6), "gets nowhere")
GONE = (Patience(fresh=0.02, wait=5.0, settle=0.0, silent=0.6, stuck=60.0), "is gone")


def test_each_chunk_is_read_by_one_node_only(nodes: list[Node]) -> None:
    for node in nodes:
        node.one.writer()

    async def work(trackers: list[PeerTracker]) -> None:
        answers = await asyncio.gather(*(t.exchange(swarm_of(nodes), WANTED) for t in trackers))
        claimed = [chunk for answer in answers for chunk in answer.claimed]
        assert sorted(claimed) == list(range(CHUNKS))
        assert all(sorted((*a.claimed, *a.reading)) == list(range(CHUNKS)) for a in answers)

    with_trackers(nodes, work)


def test_who_has_a_chunk_is_found_and_nobody_claims_it(nodes: list[Node]) -> None:
    for node in nodes:
        node.one.writer()
    nodes[1].one.fill(3, 4)
    nodes[2].one.fill(4)

    async def work(trackers: list[PeerTracker]) -> None:
        answer = await trackers[0].exchange(swarm_of(nodes), WANTED)
        assert {c: {p.id for p in some} for c, some in answer.holders.items()} == {3: {"n1"}, 4: {"n1", "n2"}}
        assert (answer.counts[3], answer.counts[4], answer.counts[5]) == (1, 2, 0)
        assert not {3, 4} & {*answer.claimed, *answer.reading}
        assert set((await trackers[0].look(swarm_of(nodes), [3, 5])).holders) == {3}
        # A holder that did not have it is not named before it says so again.
        again = await trackers[0].exchange(swarm_of(nodes), Exchange(wanted=[3], missing=[(3, "n1")]))
        assert again.holders == {}

    with_trackers(nodes, work, Patience(fresh=PATIENCE, wait=PATIENCE, settle=0.0))


def test_nodes_that_do_not_stage_it_own_nothing(nodes: list[Node]) -> None:
    nodes[0].one.writer()
    nodes[1].one.writer()

    async def work(trackers: list[PeerTracker]) -> None:
        answers = await asyncio.gather(*(t.exchange(swarm_of(nodes), WANTED) for t in trackers[:2]))
        assert sorted(answers[0].claimed + answers[1].claimed) == list(range(CHUNKS))

    with_trackers(nodes, work)


def test_those_that_come_later_wait_before_they_read(nodes: list[Node]) -> None:
    nodes[0].one.writer()
    nodes[1].one.writer()

    async def work(trackers: list[PeerTracker]) -> None:
        answer = await trackers[0].exchange(swarm_of(nodes), WANTED)
        assert answer.claimed == ()
        await asyncio.sleep(0.4)
        assert (await trackers[0].exchange(swarm_of(nodes), WANTED)).claimed

    with_trackers(nodes, work, Patience(fresh=0.02, wait=5.0, settle=0.3))


def test_a_node_alone_reads_everything_at_once(nodes: list[Node]) -> None:
    async def work(trackers: list[PeerTracker]) -> None:
        answer = await trackers[0].exchange(swarm_of(nodes), Exchange(wanted=range(CHUNKS), claims=5))
        assert answer.claimed == tuple(range(5))

    with_trackers(nodes[:1], work, Patience())


@pytest.mark.parametrize(("patience", "how"), [GONE, STUCK])
def test_what_a_node_owns_that_is_gone_or_stuck_the_others_read_once(
    nodes: list[Node], patience: Patience, how: str
) -> None:
    for node in nodes[:3]:
        node.one.writer()

    async def work(trackers: list[PeerTracker]) -> None:
        swarm = swarm_of(nodes)
        read: list[int] = []
        filled: dict[str, set[int]] = {node.peer.id: set() for node in nodes}
        before = (await trackers[2].exchange(swarm, WANTED)).claimed
        assert before
        async with asyncio.timeout(PATIENCE):
            while len(read) < CHUNKS:
                for tracker, node in zip(trackers[:2], nodes, strict=False):
                    mine = filled[node.peer.id]
                    wanted = [chunk for chunk in range(CHUNKS) if chunk not in mine]
                    answer = await tracker.exchange(swarm, Exchange(wanted=wanted, claims=1))
                    if answer.claimed:
                        node.one.fill(*answer.claimed)
                        mine.update(answer.claimed)
                        read += answer.claimed
                if how == "is gone":
                    nodes[2].server.stop()
                await asyncio.sleep(0.05)
        assert sorted(read) == list(range(CHUNKS))

    with_trackers(nodes[:3], work, patience)


def test_a_member_that_is_silent_holds_nobody_up(nodes: list[Node]) -> None:
    import socket

    nodes[0].one.writer()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = Peer("mute", f"127.0.0.1:{silent.getsockname()[1]}")

        async def work(trackers: list[PeerTracker]) -> None:
            async with asyncio.timeout(PATIENCE):
                claimed: tuple[int, ...] = ()
                while sorted(claimed) != list(range(CHUNKS)):
                    claimed = (await trackers[0].exchange(swarm_of(nodes), WANTED)).claimed
                    await asyncio.sleep(0.05)

        with_trackers(
            nodes[:1],
            work,
            Patience(fresh=0.02, wait=0.05, settle=0.0, silent=0.4),
            members=[nodes[0].peer, mute],
        )


def test_members_that_are_no_more_are_not_asked(nodes: list[Node]) -> None:
    for node in nodes:
        node.one.fill(1)

    async def work(trackers: list[PeerTracker]) -> None:
        one = trackers[0]
        assert [peer.id for peer in await one.members()] == ["n0", "n1", "n2", "n3"]
        assert len((await one.look(swarm_of(nodes), [1])).holders[1]) == min(3, MAX_HOLDERS)
        one.know([nodes[2].peer])
        assert [peer.id for peer in (await one.look(swarm_of(nodes), [1])).holders[1]] == ["n2"]
        assert [peer.id for peer in await one.members()] == ["n0", "n2"]

    with_trackers(nodes, work)


def test_without_anything_shared_each_node_asks_for_itself(nodes: list[Node]) -> None:
    async def work(trackers: list[PeerTracker]) -> None:
        one = trackers[0]
        assert not await one.register(nodes[0].peer, 10)
        await one.announce(swarm_of(nodes), bytes(CHUNKS // 8))
        await one.remember("key", b"value", 10)
        assert await one.recall("key") is None
        assert await one.once("key", 10, lambda: asyncio.sleep(0, b"asked")) == b"asked"
        await one.add_kin("key", "snapshot")
        assert await one.kin("key") == []
        await one.leave(swarm_of(nodes))
        await one.unregister()

    with_trackers(nodes[:1], work)
