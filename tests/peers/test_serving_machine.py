"""Whatever happens to an object, an answer is exactly the bytes of its marked chunks, or none."""

from __future__ import annotations

import random
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.peers import Held, answer, connection, held, send_get

from headrace.cache.object import ObjectFolder
from headrace.cache.peers.protocol import Ask
from headrace.cache.peers.security import Security
from headrace.cache.peers.server import PeerServer
from headrace.cache.store import Store

LENGTHS = (10, 70_000, 1, 4096, 65_536)
CHUNKS = len(LENGTHS)
indexes = st.integers(0, CHUNKS - 1)


class Serving(RuleBasedStateMachine):
    """The model: whether the object is there, which chunks are marked, whether it is complete, and its bytes.

    Each time the object is made again, or repaired, its bytes are others, so that old ones would show.
    """

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.open(Path(self.folder.name) / "store")
        self.server = PeerServer(self.store, Security())
        self.server.start()
        self.calls = connection(self.server)
        self.sock = self.calls.__enter__()
        self.one: Held = held(self.store, LENGTHS)
        self.seed = 1
        self.present = False
        self.complete = False
        self.marked: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "sock"):
            self.calls.__exit__(None, None, None)
            self.server.stop()
            self.one.close()
            self.store.close()
            self.folder.cleanup()

    def other_bytes(self) -> None:
        self.seed += 1
        self.one = replace(self.one, content=random.Random(self.seed).randbytes(sum(LENGTHS)))

    @precondition(lambda self: not self.present)
    @rule()
    def create(self) -> None:
        self.one.create()
        self.present = True

    @precondition(lambda self: self.present and not self.complete)
    @rule(index=indexes)
    def fill(self, index: int) -> None:
        self.one.fill(index)
        self.marked.add(index)

    @precondition(lambda self: self.present and not self.complete)
    @rule(index=indexes)
    def take_back(self, index: int) -> None:
        self.one.take_back(index)
        self.marked.discard(index)

    @precondition(lambda self: self.present and not self.complete)
    @rule()
    def complete_it(self) -> None:
        self.one.fill(*(set(range(CHUNKS)) - self.marked or {0}))
        self.one.complete()
        self.marked = set(range(CHUNKS))
        self.complete = True

    @precondition(lambda self: self.complete)
    @rule(scratch=st.booleans())
    def repair(self, scratch: bool) -> None:
        partial = self.one.folder.partial
        partial.write_bytes(bytes(sum(LENGTHS)))
        if not scratch:
            self.other_bytes()
            partial.write_bytes(self.one.content)
            partial.rename(self.one.folder.data)

    @precondition(lambda self: self.present)
    @rule()
    def evict(self) -> None:
        self.one.close()
        self.store.discard(ObjectFolder(self.one.folder.path))
        self.present = self.complete = False
        self.marked = set()
        self.other_bytes()

    @rule(ends=st.lists(st.integers(0, CHUNKS), min_size=2, max_size=2, unique=True))
    def look(self, ends: list[int]) -> None:
        first, last = sorted(ends)
        send_get(self.sock, Ask("chunks", self.one.domain, self.one.id, first, last).path)
        status, _, body = answer(self.sock)
        if self.marked.issuperset(range(first, last)):
            assert (status, body) == (200, self.one.bytes_of(first, last))
        else:
            assert status == 404


Serving.TestCase.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
TestServing = Serving.TestCase


@pytest.mark.parametrize("readers", [3])
def test_readers_beside_a_stager_and_an_evictor_never_see_a_wrong_byte(
    store: Store, one: Held, readers: int
) -> None:
    """In threads, as in the world; an answer may be cut short, but what came is right."""
    ended = threading.Event()
    wrong: list[str] = []
    whole = [0] * readers

    def look(number: int) -> None:
        choose = random.Random(number)
        while not ended.is_set():
            with connection(server) as sock:
                for _ in range(50):
                    first = choose.randrange(one.chunks)
                    last = choose.randint(first + 1, one.chunks)
                    try:
                        send_get(sock, Ask("chunks", one.domain, one.id, first, last).path)
                        status, _, body = answer(sock)
                    except (EOFError, ConnectionError):
                        break
                    if status == 200:
                        whole[number] += 1
                        if body != one.bytes_of(first, last):
                            wrong.append(f"chunks {first}-{last}")
                    elif status not in (404, 503):
                        wrong.append(f"{status}: {body!r}")

    with PeerServer(store, Security(), slots=2) as server:
        threads = [threading.Thread(target=look, args=(n,)) for n in range(readers)]
        for thread in threads:
            thread.start()
        choose = random.Random(0)
        try:
            for round_ in range(12):
                one.create()
                order = list(range(one.chunks))
                choose.shuffle(order)
                for index in order:
                    one.fill(index)
                if round_ % 2:
                    one.complete()
                seen = sum(whole)
                while sum(whole) < seen + 3 and not wrong:
                    ended.wait(0.002)
                one.close()
                store.discard(one.folder)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        # Every slot is free again: as many uploads as there are slots can begin.
        one.create()
        one.fill()
        with connection(server) as first, connection(server) as second:
            for sock in (first, second):
                send_get(sock, Ask("chunks", one.domain, one.id, 0, one.chunks).path)
            assert [answer(sock)[2] for sock in (first, second)] == [one.content, one.content]
    assert not wrong
    assert all(whole)
