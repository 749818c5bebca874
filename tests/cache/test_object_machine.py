"""Two stagers over one object, random claims, marks, syncs, crashes and reboots: marks stay true."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.cache import object as objects
from headrace.cache.chunkmap import ABSENT, DURABLE, ChunkMap
from headrace.cache.digest import XXH3, chunk_digest
from headrace.cache.grid import Grid
from headrace.cache.object import ObjectFolder, ObjectSpec, ObjectWriter, learned_digests

SPEC = ObjectSpec("id", "pin:x", Grid((700, 4096, 1, 4096, 300, 4096)), XXH3)
DATA = b"".join(bytes([65 + i]) * n for i, n in enumerate(SPEC.grid.lengths))
COUNT = len(SPEC.grid)
writers = st.sampled_from([0, 1])
indexes = st.integers(0, COUNT - 1)


class ObjectMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        (self.top / "objects").mkdir()
        (self.top / "tmp").mkdir()
        self.folder = ObjectFolder(self.top / "objects" / "id")
        self.writers: list[ObjectWriter] = []
        # The model: who claims what, what is marked, by whom, and what a sync made safe.
        self.claims: list[set[int]] = [set(), set()]
        self.marked: set[int] = set()
        self.unsynced: list[set[int]] = [set(), set()]
        self.durable: set[int] = set()

    @initialize()
    def begin(self) -> None:
        objects.create(SPEC, self.folder, self.top / "tmp")
        self.writers = [ObjectWriter(self.folder, SPEC) for _ in range(2)]

    def teardown(self) -> None:
        for writer in self.writers:
            writer.close()
        shutil.rmtree(self.top)

    @rule(who=writers, first=indexes, count=st.integers(1, 3))
    def claim(self, who: int, first: int, count: int) -> None:
        last = min(COUNT, first + count)
        wanted = set(range(first, last))
        free = not wanted & (self.claims[1 - who] | self.marked)
        assert self.writers[who].claim(first, last) == (free and not self.writers[who].complete)
        if free and not self.writers[who].complete:
            self.claims[who] |= wanted
        elif not wanted & self.claims[1 - who]:
            # The lock was had and given back with all of its range.
            self.claims[who] -= wanted

    @rule(who=writers)
    def fetch_what_is_claimed(self, who: int) -> None:
        for index in sorted(self.claims[who] - self.marked):
            start, stop = SPEC.grid.span(index, index + 1)
            self.writers[who].write(DATA[start:stop], start)
            self.writers[who].mark(index, chunk_digest(XXH3, DATA[start:stop]))
            self.marked.add(index)
            self.unsynced[who].add(index)

    @rule(who=writers, most=st.integers(1, COUNT))
    def take_whatever_is_free(self, who: int, most: int) -> None:
        """As a stager does: claim, write, mark, release."""
        free = sorted(set(range(COUNT)) - self.marked - self.claims[0] - self.claims[1])
        for index in free[:most]:
            self.claim(who, index, 1)
        self.fetch_what_is_claimed(who)
        self.release(who)

    @rule(who=writers, index=indexes)
    def write_without_marking(self, who: int, index: int) -> None:
        """A chunk that was in flight when its stager died."""
        if index in self.claims[who] - self.marked:
            self.writers[who].write(b"\0torn", SPEC.grid.offsets[index])

    @rule(who=writers)
    def release(self, who: int) -> None:
        for index in self.claims[who]:
            self.writers[who].release(index, index + 1)
        self.claims[who] = set()

    @rule(who=writers)
    def sync(self, who: int) -> None:
        self.writers[who].sync()
        self.durable |= self.unsynced[who]
        self.unsynced[who] = set()

    @rule(who=writers)
    def crash(self, who: int) -> None:
        self.writers[who].close()
        self.claims[who] = set()
        self.unsynced[who] = set()
        self.writers[who] = ObjectWriter(self.folder, SPEC)

    @rule(lost=st.sets(indexes))
    def lose_power(self, lost: set[int]) -> None:
        """Both die; of what was not synced, some bytes never reached the disk."""
        for writer in self.writers:
            writer.close()
        if not self.folder.complete:
            with open(self.folder.partial, "r+b") as file:
                for index in lost - self.durable:
                    file.seek(SPEC.grid.offsets[index])
                    file.write(bytes(SPEC.grid.lengths[index]))
            with open(self.folder.map, "r+b") as file:
                # The boot on which the map was written.
                file.seek(24)
                file.write(b"another boot".ljust(36, b"\0"))
            with ChunkMap.open(self.folder.map, writable=False) as chunk_map:
                assert not chunk_map.ready(0, COUNT) or self.durable >= set(range(COUNT))
            self.marked -= lost - self.durable
        # The first who opens it hashes again what was not synced, and will sync it.
        self.claims, self.unsynced = [set(), set()], [self.marked - self.durable, set()]
        self.writers = [ObjectWriter(self.folder, SPEC) for _ in range(2)]

    @rule(who=writers)
    def complete(self, who: int) -> None:
        full = self.marked == set(range(COUNT))
        if not full or self.claims[1 - who] or self.writers[who].complete:
            return
        # The other has it open too: one of them has to wait, and neither may be refused for ever.
        done = [self.writers[i].try_complete() for i in (who, 1 - who)]
        assert done[1]
        assert self.writers[who].try_complete()
        self.durable = set(range(COUNT))

    @invariant()
    def marks_are_exactly_what_was_marked(self) -> None:
        if not self.writers or self.folder.complete:
            return
        states = self.writers[0].map.states()
        assert {i for i, state in enumerate(states) if state != ABSENT} == self.marked
        assert {i for i, state in enumerate(states) if state == DURABLE} >= self.durable
        assert {self.writers[i].map.next_absent(0) for i in (0, 1)} == {
            min(set(range(COUNT)) - self.marked, default=-1)
        }

    @invariant()
    def every_marked_byte_is_right_and_has_its_digest(self) -> None:
        if not self.writers:
            return
        stored = (self.folder.data if self.folder.complete else self.folder.partial).read_bytes()
        digests = learned_digests(self.folder, COUNT)
        for index in self.marked:
            start, stop = SPEC.grid.span(index, index + 1)
            assert stored[start:stop] == DATA[start:stop]
            assert digests[index] == chunk_digest(XXH3, DATA[start:stop])

    @invariant()
    def what_is_complete_is_full_and_read_only(self) -> None:
        if self.folder.complete:
            assert self.marked == set(range(COUNT))
            assert self.folder.data.read_bytes() == DATA
            assert self.folder.data.stat().st_mode & 0o777 == 0o444


ObjectMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, database=None
)
TestObject = ObjectMachine.TestCase
