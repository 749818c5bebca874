"""What nodes can rely on when they share Redis or Valkey."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.redis_server import RedisServer
from support.trackers import SWARM, Beside, Nodes, bitmap, with_nodes

from headrace.cache.tracker import redis as tracker_module
from headrace.cache.tracker.protocol import MAX_HOLDERS, MAX_WANTED, Exchange, Peer, Swarm
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings

LONG = 100.0
_serial = itertools.count()


async def holders(node: RedisTracker, chunk: int, swarm: Swarm = SWARM) -> set[str]:
    answer = await node.look(swarm, [chunk])
    return {peer.id for peer in answer.holders.get(chunk, ())}


# Claims


@hypothesis_settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(12)), budgets=st.lists(st.integers(0, 5), min_size=6, max_size=6))
def test_two_nodes_never_hold_the_same_claim(
    redis: RedisServer, order: list[int], budgets: list[int]
) -> None:
    settings = TrackerSettings(redis.url, prefix=f"claims{next(_serial)}", timeout=200, lease=1000)

    async def work(nodes: Nodes) -> None:
        some = [nodes.add(f"n{i}") for i in range(6)]
        taken: dict[int, int] = {}
        for _ in range(3):
            asked = [
                node.exchange(SWARM, Exchange(wanted=order[i:] + order[:i], claims=budgets[i]))
                for i, node in enumerate(some)
            ]
            for i, answer in enumerate(await asyncio.gather(*asked)):
                assert not set(answer.claimed) & set(answer.reading)
                assert len(answer.claimed) <= budgets[i]
                for chunk in answer.claimed:
                    assert taken.setdefault(chunk, i) == i

    with_nodes(settings, work)


def test_a_claim_ends_with_its_lease_unless_it_is_kept(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        reader, keeper, other = (nodes.add(name) for name in ("reader", "keeper", "other"))
        assert (await reader.exchange(SWARM, Exchange(wanted=[1], claims=1))).claimed == (1,)
        assert (await keeper.exchange(SWARM, Exchange(wanted=[2], claims=1))).claimed == (2,)
        ends = time.monotonic() + 3.0
        while time.monotonic() < ends:
            await keeper.exchange(SWARM, Exchange(keep=[2]))
            await asyncio.sleep(0.05)
        answer = await other.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))
        assert (answer.claimed, answer.reading) == ((1,), (2,))
        # Too late: it is another's now.
        await reader.exchange(SWARM, Exchange(keep=[1]))
        assert (await reader.exchange(SWARM, Exchange(wanted=[1], claims=1))).reading == (1,)

    with_nodes(replace(settings, lease=2.5), work)


def test_a_claim_that_redis_has_lost_is_made_again_by_who_still_reads(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        reader, other = nodes.add("reader"), nodes.add("other")
        await reader.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))
        with Beside(settings) as beside:
            beside.client.delete(*beside.names())
        await reader.exchange(SWARM, Exchange(keep=[1, 2]))
        assert (await other.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))).reading == (1, 2)

    with_nodes(settings, work)


def test_what_a_node_gives_back_the_next_one_reads(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, other = nodes.add("one"), nodes.add("other")
        await one.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))
        await other.exchange(SWARM, Exchange(give_back=[1]))  # not its own
        await one.exchange(SWARM, Exchange(give_back=[2]))
        answer = await other.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))
        assert (answer.claimed, answer.reading) == ((2,), (1,))

    with_nodes(settings, work)


# Nodes that die


def test_a_dead_nodes_chunks_and_claims_are_freed_by_the_next_heartbeat_of_any_other(
    settings: TrackerSettings,
) -> None:
    async def work(nodes: Nodes) -> None:
        gone, other = nodes.add("gone"), nodes.add("other")
        await gone.register(Peer("gone", "gone:1"), 0.3)
        await gone.announce(SWARM, bitmap(SWARM, range(50)))
        await gone.exchange(SWARM, Exchange(wanted=[60], claims=1))
        await other.register(Peer("other", "other:1"), LONG)
        assert await holders(other, 7) == {"gone"}
        await asyncio.sleep(0.35)
        assert await holders(other, 7) == {"gone"}
        await other.register(Peer("other", "other:1"), LONG)
        assert [peer.id for peer in await other.members()] == ["other"]
        assert await holders(other, 7) == set()
        assert (await other.exchange(SWARM, Exchange(wanted=[60], claims=1))).claimed == (60,)
        with Beside(settings) as beside:
            assert not [key for key in beside.names() if b"gone" in key]

    with_nodes(settings, work)


def test_a_freed_column_brings_nothing_to_its_next_owner(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, watcher = nodes.add("one"), nodes.add("watcher")
        await one.announce(SWARM, bitmap(SWARM, range(100)))
        assert await holders(watcher, 3) == {"one"}
        await one.leave(SWARM)
        two = nodes.add("two")
        await two.exchange(SWARM, Exchange(gained=[5]))
        assert await holders(watcher, 3) == set()
        # The watcher remembers who owned that column before.
        assert await holders(watcher, 5) == {"two"}

    with_nodes(settings, work)


def test_a_node_that_comes_back_is_told_to_announce_everything_again(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        me = Peer("one", "one:1")
        one, other = nodes.add("one"), nodes.add("other")
        assert await one.register(me, 0.3)
        assert not await one.register(me, 0.3)
        await asyncio.sleep(0.35)
        assert await one.register(me, LONG)
        assert not await one.register(me, LONG)
        with Beside(settings) as beside:
            beside.client.delete(*beside.names())
        # Another process of the node says something first.
        await nodes.add("one").exchange(SWARM, Exchange(gained=[1]))
        assert await one.register(me, LONG)
        assert {peer.id for peer in await other.members()} == {"one"}

    with_nodes(settings, work)


def test_clearing_up_is_done_in_parts_and_stops_when_the_node_lives(
    settings: TrackerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "CLEARING", 3)
    monkeypatch.setattr(tracker_module, "CLEARED", 40)
    swarms = [Swarm(f"s{i}", 100) for i in range(4)]

    async def work(nodes: Nodes) -> None:
        dead, other = nodes.add("dead"), nodes.add("other")
        await dead.register(Peer("dead", "dead:1"), 0.2)
        for swarm in swarms:
            await dead.announce(swarm, bitmap(swarm, range(100)))
        await asyncio.sleep(0.25)

        async def left() -> int:
            answers = [await other.look(swarm, range(100)) for swarm in swarms]
            return sum(answer.counts[chunk] for answer in answers for chunk in range(100))

        before = await left()
        assert before == 400
        with Beside(settings) as beside:
            for _ in range(8):
                await other.register(Peer("other", "other:1"), LONG)
                now = await left()
                assert before - now <= 3 * 40
                before = now
                # Others wait for a while before they take over.
                beside.client.delete(f"{settings.prefix}:clears:dead")
                if before < 200:
                    await dead.register(Peer("dead", "dead:1"), LONG)
        assert 0 < before < 200

    with_nodes(settings, work)


def test_a_node_that_goes_leaves_nothing(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, other = nodes.add("one"), nodes.add("other")
        await one.register(Peer("one", "one:1"), LONG)
        await one.announce(SWARM, bitmap(SWARM, [1]))
        await one.exchange(SWARM, Exchange(wanted=[2], claims=1))
        await other.exchange(SWARM, Exchange())
        await one.unregister()
        answer = await other.exchange(SWARM, Exchange(wanted=[1, 2], claims=2))
        assert answer.claimed == (1, 2)
        assert [peer.id for peer in await other.members()] == ["other"]
        await other.unregister()
        with Beside(settings) as beside:
            assert [key for key in beside.names() if not key.endswith((b":deadlines", b":members"))] == []

    with_nodes(settings, work)


# What is held


def test_an_announcement_takes_back_what_it_lacks_but_not_what_came_just_now(
    settings: TrackerSettings,
) -> None:
    async def work(nodes: Nodes) -> None:
        one, other = nodes.add("one", settled=0.4), nodes.add("other")
        await one.announce(SWARM, bitmap(SWARM, [1, 2]))
        await one.announce(SWARM, bitmap(SWARM, [2, 3]))
        assert [await holders(other, chunk) for chunk in (1, 2, 3)] == [set(), {"one"}, {"one"}]
        await one.exchange(SWARM, Exchange(gained=[4]))
        await one.announce(SWARM, bitmap(SWARM, [2, 3]))
        assert await holders(other, 4) == {"one"}
        await asyncio.sleep(0.45)
        await one.announce(SWARM, bitmap(SWARM, [2, 3]))
        assert await holders(other, 4) == set()

    with_nodes(settings, work)


def test_a_report_of_a_missing_chunk_clears_that_chunk_of_that_node_only(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, two, asker = nodes.add("one"), nodes.add("two"), nodes.add("asker")
        for node in (one, two):
            await node.announce(SWARM, bitmap(SWARM, [1, 2]))
        await asker.exchange(SWARM, Exchange(missing=[(1, "one"), (2, "nobody")]))
        assert await holders(asker, 1) == {"two"}
        assert await holders(asker, 2) == {"one", "two"}
        await one.announce(SWARM, bitmap(SWARM, [1, 2]))
        assert await holders(asker, 1) == {"one", "two"}

    with_nodes(settings, work)


def test_who_wants_a_chunk_is_no_holder_of_it(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        await one.announce(SWARM, bitmap(SWARM, [1, 2]))
        await two.announce(SWARM, bitmap(SWARM, [2]))
        answer = await one.exchange(SWARM, Exchange(wanted=[1, 2], claims=1))
        assert answer.claimed == (1,)
        assert [peer.id for peer in answer.holders[2]] == ["two"]
        assert answer.counts == {1: 0, 2: 1}

    with_nodes(settings, work)


def test_many_chunks_can_be_said_and_asked_at_once(settings: TrackerSettings) -> None:
    swarm = Swarm("large", 5003)

    async def work(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        learned = {chunk: b"%d" % chunk for chunk in range(0, 5000, 2)}
        await one.exchange(swarm, Exchange(gained=range(5003), digests=learned))
        await one.exchange(swarm, Exchange(lost=[*range(1, 5000, 2), 5000, 5001, 5002]))
        await two.announce(swarm, bitmap(swarm, range(0, 5003, 3)))
        answer = await two.look(swarm, range(5003))
        assert answer.counts == {c: (c % 2 == 0 and c < 5000) + (c % 3 == 0) for c in range(5003)}
        assert answer.digests == {c: digest for c, digest in learned.items() if c in answer.holders}
        with pytest.raises(ValueError, match="wanted"):
            await one.exchange(swarm, Exchange(wanted=range(MAX_WANTED + 1)))
        with pytest.raises(ValueError, match="map"):
            await one.announce(swarm, b"")
        with pytest.raises(ValueError, match="chunk"):
            await one.exchange(swarm, Exchange(gained=[5003]))

    with_nodes(settings, work)


def test_the_same_snapshot_cut_differently_is_another_swarm(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one = nodes.add("one")
        await one.announce(Swarm("snapshot", 10), bitmap(Swarm("snapshot", 10), [1]))
        assert await holders(nodes.add("two"), 1, Swarm("snapshot", 11)) == set()

    with_nodes(settings, work)


# Many nodes, and zones


def test_rows_grow_with_the_nodes(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        some = [nodes.add(f"n{i:03}") for i in range(70)]
        for i, node in enumerate(some):
            await node.exchange(SWARM, Exchange(gained=[i % 10, 99]))
        answer = await nodes.add("watcher").look(SWARM, range(100))
        assert answer.counts == {c: 7 if c < 10 else 70 if c == 99 else 0 for c in range(100)}
        for chunk in range(10):
            assert {int(peer.id[1:]) % 10 for peer in answer.holders[chunk]} == {chunk}

    with_nodes(settings, work)


def test_holders_of_the_own_zone_come_first_and_one_of_another(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        for i in range(40):
            zone = f"z{i % 5}"
            await nodes.add(f"{zone}-{i}", zone).exchange(SWARM, Exchange(gained=[1] if i else [1, 2]))
        asker = nodes.add("asker", "z3")
        for _ in range(10):
            answer = await asker.exchange(SWARM, Exchange(wanted=[1, 2]))
            assert [peer.zone for peer in answer.holders[1]].count("z3") == MAX_HOLDERS - 1
            assert len(answer.holders[1]) == MAX_HOLDERS
            assert [peer.id for peer in answer.holders[2]] == ["z0-0"]

    with_nodes(settings, work)


def test_a_very_large_swarm_is_answered_in_part_but_nobody_is_overlooked(settings: TrackerSettings) -> None:
    # Each zone has columns of its own, so that few nodes make rows as long as those of thousands; the last ones
    # share columns.
    async def work(nodes: Nodes) -> None:
        for i in range(70):
            await nodes.add(f"n{i}", f"z{i}").exchange(SWARM, Exchange(gained=[0, 1 + i]))
        asker = nodes.add("asker", "z3")
        seen: set[str] = set()
        for _ in range(40):
            answer = await asker.exchange(SWARM, Exchange(wanted=[0, *range(1, 60)], claims=1))
            assert answer.claimed == ()
            assert all([peer.id for peer in answer.holders[1 + i]] == [f"n{i}"] for i in range(59))
            seen |= {peer.id for peer in answer.holders[0]}
            assert 0 < len(answer.holders[0]) <= MAX_HOLDERS
        assert len(seen) > 30
        answer = await asker.exchange(SWARM, Exchange(wanted=[80], claims=1))
        assert answer.claimed == (80,)

    with_nodes(settings, work)


# Keys


def test_clusters_with_other_prefixes_do_not_see_each_other(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        async with Nodes(replace(settings, prefix=f"{settings.prefix}-other")) as others:
            one, other = nodes.add("one"), others.add("other")
            await one.announce(SWARM, bitmap(SWARM, [1]))
            await one.remember("key", b"value", LONG)
            assert await holders(other, 1) == set()
            assert await other.recall("key") is None
            assert (await other.exchange(SWARM, Exchange(wanted=[1], claims=1))).claimed == (1,)
            assert [peer.id for peer in await other.members()] == ["other"]

    with_nodes(settings, work)


def test_whatever_is_said_is_gone_after_its_time(settings: TrackerSettings) -> None:
    short = replace(settings, lease=0.2, lifetime=1.0)

    async def work(nodes: Nodes) -> None:
        seen: set[bytes] = set()
        with Beside(settings) as beside:
            for i in range(30):
                node, swarm = nodes.add(f"n{i}"), Swarm(f"s{i % 7}", 20)
                await node.register(Peer(f"n{i}", "host:1"), 0.5)
                await node.exchange(swarm, Exchange(gained=[1], digests={1: b"d"}, wanted=[2], claims=1))
                await node.announce(swarm, bitmap(swarm, [3]))
                await node.remember(f"value {i}", b"value", 0.5)
                await node.add_kin(f"key {i % 3}", f"snapshot {i}")
                assert await node.once(f"once {i}", 0.5, lambda: asyncio.sleep(0, b"found")) == b"found"
                seen.update(beside.names())
            assert len(seen) > 60
            kin = f"{settings.prefix}:kin:".encode()
            week = 7 * 86400 * 1000
            for key in beside.names():
                assert 0 < beside.client.pttl(key) <= (week if key.startswith(kin) else 1000) or not (
                    beside.client.exists(key)
                ), key
            await asyncio.sleep(1.1)
            left = [key for key in beside.names() if not key.startswith(kin)]
            assert left == []
            assert len(beside.names()) == 3
            assert all(beside.client.llen(key) <= 8 for key in beside.names())

    with_nodes(short, work)


def test_what_is_used_stays(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, other = nodes.add("one"), nodes.add("other")
        await one.exchange(SWARM, Exchange(gained=[1], digests={1: b"d"}))
        for _ in range(9):
            await asyncio.sleep(0.3)
            answer = await other.exchange(SWARM, Exchange(wanted=[1]))
            assert answer.counts == {1: 1}
        assert answer.digests == {1: b"d"}

    with_nodes(replace(settings, lease=0.2, lifetime=2.0), work)


# Digests


def test_learned_digests_go_with_their_holders_and_the_first_one_counts(settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, two, asker = nodes.add("one"), nodes.add("two"), nodes.add("asker")
        await one.exchange(SWARM, Exchange(gained=[1], digests={1: b"first"}))
        await two.exchange(SWARM, Exchange(gained=[1], digests={1: b"second"}))
        assert (await asker.exchange(SWARM, Exchange(wanted=[1]))).digests == {1: b"first"}
        assert (await asker.look(SWARM, [1, 2])).digests == {1: b"first"}
        await asker.exchange(SWARM, Exchange(missing=[(1, "one"), (1, "two")]))
        await two.exchange(SWARM, Exchange(gained=[1], digests={1: b"second"}))
        assert (await asker.exchange(SWARM, Exchange(wanted=[1]))).digests == {1: b"second"}

    with_nodes(settings, work, secrets=(b"a secret of this cluster",))


def test_a_digest_that_a_stranger_planted_is_ignored(
    settings: TrackerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        await one.exchange(SWARM, Exchange(gained=[1], digests={1: b"d" * 16}))
        with Beside(settings) as beside:
            beside.client.hset(beside.key(":digests"), "1", b"e" * 24)
        answer = await two.exchange(SWARM, Exchange(wanted=[1]))
        assert (set(answer.holders), answer.digests) == ({1}, {})

    with caplog.at_level(logging.WARNING):
        with_nodes(settings, work, secrets=(b"a secret of this cluster",))
    assert len(caplog.records) == 1
