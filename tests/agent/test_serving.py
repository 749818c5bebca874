"""An agent that serves other nodes while it is told to stop, or to use other secrets."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.agents import RunningAgent
from support.command import Command, wait_until
from support.models import published
from support.stores import write_files

from headrace.cache.errors import ClusterError, NotAuthenticated
from headrace.cache.numbering import Numbering
from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.security import Security
from headrace.cache.store import Store
from headrace.cache.tracker.protocol import Peer

PATIENCE = 60.0
PATIENT = PeerTimeouts(connect=PATIENCE, first_byte=PATIENCE, stall=PATIENCE)
OLD, NEW = "the secret that all nodes had", "the secret that they get now"


@dataclass
class Upload:
    """The largest file of a holder's only snapshot, and what has come of it."""

    holder: RunningAgent
    peer: Peer
    object_id: str = ""
    snapshot: str = ""
    chunks: int = 0
    all_chunks: int = 0
    size: int = 0
    path: str = ""
    got: bytearray = field(default_factory=bytearray)
    begun: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, holder: RunningAgent) -> Upload:
        found = cls(holder, Peer("", holder.client.ask("GET", "/v1/status")["cluster"]["me"]["address"]))
        with Store.open(holder.command.root, writable=False) as store:
            (snapshot,) = store.domain().snapshots()
            numbering = Numbering.of(snapshot.manifest(), "default")
        at, file = max(enumerate(numbering.files), key=lambda one: one[1].size)
        found.object_id, found.snapshot = numbering.ids[at], snapshot.id
        found.chunks, found.all_chunks = len(file.grid), numbering.chunks
        found.size, found.path = file.size, file.path
        return found

    def put(self, block: memoryview) -> None:
        self.got += block
        self.begun.set()

    async def run(self, client: PeerClient) -> None:
        await client.read_to(
            self.peer, "default", self.object_id, 0, self.chunks, self.size, self.put, demand=True
        )

    async def ask(self, client: PeerClient) -> None:
        """Something small."""
        await client.held(self.peer, "default", self.snapshot, self.all_chunks)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{OLD}\n")
    return path


@pytest.fixture
def serving(tmp_path: Path, files: dict[str, bytes], secret: Path) -> Callable[..., RunningAgent]:
    """A node that serves others."""
    write_files(tmp_path / "model", published(files))
    (tmp_path / "home").mkdir()

    def make(name: str = "a", **more: dict[str, Any]) -> RunningAgent:
        sections: dict[str, dict[str, Any]] = {
            "peers": {"listen": "127.0.0.1:0", "secrets": {"default": str(secret)}}
        }
        for section, values in more.items():
            sections.setdefault(section, {}).update(values)
        environ = {"HEADRACE_SOCKET": str(tmp_path / "none.sock")}
        command = Command(tmp_path / "home", tmp_path / name / "store", environ)
        return RunningAgent(command, tmp_path / name, sections)

    return make


def with_client(secret: str) -> PeerClient:
    return PeerClient(Security.shared(default=secret), timeouts=PATIENT)


def test_sigterm_lets_an_upload_end_and_refuses_new_requests(
    serving: Callable[..., RunningAgent], tmp_path: Path, files: dict[str, bytes]
) -> None:
    holder = serving(agent={"drain": PATIENCE}, bandwidth={"uploads": "1MB/s"})

    async def use() -> None:
        upload, client, other = Upload.of(holder), with_client(OLD), with_client(OLD)
        try:
            await upload.ask(other)
            transfer = asyncio.create_task(upload.run(client))
            assert await asyncio.to_thread(upload.begun.wait, PATIENCE)
            holder.signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(ClusterError):
                    while True:
                        await upload.ask(other)
                        await asyncio.sleep(0.01)
            await transfer
            assert bytes(upload.got) == files[upload.path]
        finally:
            await client.close()
            await other.close()

    with holder:
        holder.commands()("stage", tmp_path / "model")
        asyncio.run(use())
        assert holder.ended() == 0
    assert "Traceback" not in holder.log()


def test_an_upload_that_takes_longer_than_is_waited_for_is_cut(
    serving: Callable[..., RunningAgent], tmp_path: Path
) -> None:
    holder = serving(agent={"drain": 0.1}, bandwidth={"uploads": "50kB/s"})

    async def use() -> None:
        upload, client = Upload.of(holder), with_client(OLD)
        try:
            transfer = asyncio.create_task(upload.run(client))
            assert await asyncio.to_thread(upload.begun.wait, PATIENCE)
            holder.signal(signal.SIGTERM)
            with pytest.raises(ClusterError):
                await transfer
        finally:
            await client.close()

    with holder:
        holder.commands()("stage", tmp_path / "model")
        asyncio.run(use())
        assert holder.ended() == 0
    assert "Traceback" not in holder.log()


def test_sighup_takes_over_other_secrets_one_step_after_the_other(
    serving: Callable[..., RunningAgent], tmp_path: Path, secret: Path
) -> None:
    holder, other = serving("a"), serving("b")

    async def accepted(upload: Upload, *clients: PeerClient) -> list[bool]:
        found = []
        for client in clients:
            try:
                await upload.ask(client)
                found.append(True)
            except NotAuthenticated:
                found.append(False)
        return found

    def say(*secrets: str, what: str = "settings were read again") -> None:
        before = holder.log().count(what)
        secret.write_text("".join(f"{one}\n" for one in secrets))
        holder.signal(signal.SIGHUP)
        wait_until(lambda: holder.log().count(what) > before)

    async def use() -> None:
        upload = Upload.of(holder)
        # Their connections are kept from one step to the next.
        old, new = with_client(OLD), with_client(NEW)
        try:
            assert await accepted(upload, old, new) == [True, False]
            say(OLD, NEW)
            assert await accepted(upload, old, new) == [True, True]
            say("too short", what="the old ones stay")
            assert await accepted(upload, old, new) == [True, True]
            say(NEW)
            assert await accepted(upload, old, new) == [False, True]
        finally:
            await old.close()
            await new.close()
        other.more = {"peers": {**other.more["peers"], "static": [upload.peer.address]}}

    with holder:
        holder.commands()("stage", tmp_path / "model")
        asyncio.run(use())
        with other:
            report = other.commands()("stage", tmp_path / "model", "--json").json["snapshots"][0]
            assert report["sources"]["peer"] == report["bytes"]
    assert not any(one in holder.log() + other.log() for one in (OLD, NEW, "too short", "Traceback"))
