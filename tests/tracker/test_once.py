"""What is found out once per cluster."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.trackers import Beside, Nodes, with_nodes

from headrace.cache.errors import NotFound
from headrace.cache.tracker.memory import MemorySwarms, MemoryTracker
from headrace.cache.tracker.protocol import Peer
from headrace.cache.tracker.settings import TrackerSettings

PATIENCE = 60.0


class Question:
    """Counts how often it is asked, and by how many at once."""

    def __init__(self, answer: bytes = b"answer", seconds: float = 0.05, failures: int = 0) -> None:
        self.asked = self.at_once = self.most = 0
        self.answer, self.seconds, self.failures = answer, seconds, failures

    async def __call__(self) -> bytes:
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        if self.asked <= self.failures:
            raise NotFound("there is no such model.")
        return self.answer


@pytest.mark.parametrize("max_age", [0.0, 60.0])
def test_nodes_that_start_together_ask_once(redis_settings: TrackerSettings, max_age: float) -> None:
    question = Question(b"answer" * 1000)

    async def work(nodes: Nodes) -> None:
        some = [nodes.add(f"n{i}") for i in range(12)]
        found = await asyncio.gather(*(node.once("key", max_age, question) for node in some))
        assert set(found) == {b"answer" * 1000}

    with_nodes(redis_settings, work, secrets=(b"a secret of this cluster",))
    assert question.asked == 1


def test_an_answer_holds_for_as_long_as_who_asks_allows(redis_settings: TrackerSettings) -> None:
    question = Question(seconds=0)

    async def work(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        await one.once("key", 60, question)
        await two.once("key", 60, question)
        assert question.asked == 1
        await asyncio.sleep(0.15)
        await two.once("key", 0.1, question)
        assert question.asked == 2
        await one.once("key", 60, question)
        assert question.asked == 2

    with_nodes(redis_settings, work)


def test_a_question_that_fails_is_asked_by_the_next_and_never_by_two_at_once(
    redis_settings: TrackerSettings,
) -> None:
    question = Question(failures=2)

    async def work(nodes: Nodes) -> None:
        some = [nodes.add(f"n{i}") for i in range(6)]
        found = await asyncio.gather(
            *(node.once("key", 60, question) for node in some), return_exceptions=True
        )
        assert sum(isinstance(one, NotFound) for one in found) == 2
        assert found.count(b"answer") == 4

    with_nodes(redis_settings, work)
    assert (question.asked, question.most) == (3, 1)


def test_a_node_that_dies_while_it_asks_holds_the_others_up_for_one_lease(
    redis_settings: TrackerSettings,
) -> None:
    question = Question()

    async def work(nodes: Nodes) -> None:
        dead, other = nodes.add("dead"), nodes.add("other")
        assert await dead.lock("key", "a token that nobody will give back", 0.3)
        async with asyncio.timeout(PATIENCE):
            assert await other.once("key", 60, question) == b"answer"

    with_nodes(replace(redis_settings, lease=0.3), work)
    assert question.asked == 1


def test_a_long_question_keeps_its_right(redis_settings: TrackerSettings) -> None:
    question = Question(seconds=1.0)

    async def work(nodes: Nodes) -> None:
        some = [nodes.add(f"n{i}") for i in range(3)]
        await asyncio.gather(*(node.once("key", 60, question) for node in some))

    with_nodes(replace(redis_settings, lease=0.4), work)
    assert question.asked == 1


def test_an_answer_that_a_stranger_planted_is_not_believed(redis_settings: TrackerSettings) -> None:
    question = Question()

    async def work(nodes: Nodes) -> None:
        one, stranger = nodes.add("one"), nodes.add("stranger", secrets=(b"another secret",))
        await stranger.remember("key", b"planted", 60)
        assert await one.recall("key") is None
        assert await one.once("key", 60, question) == b"answer"
        with Beside(redis_settings) as beside:
            (name,) = (key for key in beside.names() if b":value:" in key)
            beside.client.set(name, b"\xff" * 50)
        assert await one.once("key", 60, question) == b"answer"

    with_nodes(redis_settings, work, secrets=(b"a secret of this cluster",))
    assert question.asked == 2


def test_a_cancelled_question_gives_the_right_to_the_next(redis_settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        asking = asyncio.create_task(one.once("key", 60, Question(seconds=PATIENCE)))
        await asyncio.sleep(0.2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(PATIENCE / 2):
            assert await two.once("key", 60, Question()) == b"answer"

    with_nodes(replace(redis_settings, lease=PATIENCE), work)


def test_in_memory_it_is_the_same() -> None:
    question = Question(failures=1)

    async def work() -> None:
        swarms = MemorySwarms()
        clock = asyncio.get_running_loop().time
        some = [MemoryTracker(swarms, Peer(f"n{i}", "host:1"), clock) for i in range(5)]
        found = await asyncio.gather(*(one.once("key", 60, question) for one in some), return_exceptions=True)
        assert found.count(b"answer") == 4
        assert await some[0].recall("key") == b"answer"

    asyncio.run(work())
    assert (question.asked, question.most) == (2, 1)
