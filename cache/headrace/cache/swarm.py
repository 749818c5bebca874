"""Staging with other nodes: drives the policy of one staging run.

The policy (`policy.scheduler`) decides, this module does: it tells it what the chunk maps show, carries its
questions to the tracker, and runs its transfers. Each transfer takes the kernel's claim on its chunk first, as any
stager of this node does; what another stager of the node has claimed is left to it. What is on this disk already
is copied first and never asked of others.

Nothing that comes from a peer is marked before it had its digest: the manifest's, where a publisher gave them; else
the one that the node learned that read the chunk from the origin, by the tracker, or (where that knows none) by the
peer that holds it. Without any digest nothing is taken from a peer. What the origin sends is right by definition;
where it contradicts a learned digest, that is said.

Whatever fails at peers or the tracker ends at the origin. What fails at the origin ends the run, unless peers
have the chunk.

Crash story: no state on disk but the store's. A killed run's claims at the tracker end with their lease.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from headrace.cache.chunkmap import ABSENT
from headrace.cache.cluster import Cluster
from headrace.cache.errors import HeadraceError, OriginUnavailable, TrackerUnavailable
from headrace.cache.kin import Kin
from headrace.cache.manifest import Manifest
from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.policy.scheduler import Scheduler
from headrace.cache.store import Domain
from headrace.cache.tracker.protocol import MAX_WANTED, Exchange, Swarm
from headrace.cache.transfers import Content, Transfers
from headrace.cache.vouched import Vouched

# Chunk maps are looked at this often, less often while nothing changes in them.
_LOOK_FIRST, _LOOK_MOST = 0.01, 0.1
_LEAST_PAUSE = 0.001
_FAREWELL = 2.0
_COPIES = 2
# Seconds that reading all claimed chunks takes, where the pace is limited.
_CLAIMED = 5.0


class Swarming:
    """How the chunks of one stager come in a cluster (see `fetching.Bringing`)."""

    def __init__(self, cluster: Cluster, domain: Domain, manifest: Manifest, content: Content) -> None:
        self._cluster = cluster
        self._domain = domain
        self._manifest = manifest
        self._content = content
        numbering = content.numbering
        self._swarm = Swarm(manifest.snapshot_id(domain.name), numbering.chunks)
        self._fillings = [content.fillings[object_id] for object_id in numbering.ids]
        self._vouched = Vouched(numbering, manifest.algorithm)
        self._scheduler = Scheduler(
            sizes=numbering.sizes,
            me=cluster.me,
            seed=random.getrandbits(32),
            limits=replace(cluster.limits, demand=content.pace.demand),
        )
        self._seen = [bytes(len(filling.file.grid)) for filling in self._fillings]
        self._wanted: set[int] = set()
        self._taken: set[int] = set()
        self._claims: set[int] = set()
        self._granted: set[int] = set()
        self._exchange: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._ending = False
        self._look_pause = _LOOK_FIRST

    def begin(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._driver = group.create_task(self._drive())

    def go_on(self) -> None:
        """It goes on by itself."""

    async def end(self) -> None:
        self._ending = True
        self._news.set()
        await self._driver

    # -- driving

    async def _drive(self) -> None:
        try:
            self._observe()
            local = self._local_chunks()
            absent = [n for n in range(self._swarm.chunks) if not self._present(n) and n not in local]
            kin = await Kin.open(self._cluster, self._domain, self._manifest, self._content.numbering, absent)
            self._transfers = Transfers(
                self._cluster,
                self._content,
                self._vouched,
                kin,
                ended=self._transfer_ended,
                refused=self._origin_refused,
            )
            self._copy(local)
            while not self._ending:
                self._observe()
                self._scheduler.set_demand(self._content.pace.demand)
                if self._content.pace.rate("origin") == 0:
                    # Others may read what this node is not allowed to.
                    self._transfers.cancel_origin()
                self._ask()
                self._start()
                await self._pause()
            await self._say_the_rest()
        finally:
            await self._give_back()

    async def _pause(self) -> None:
        """Until something happens, the policy wants to go on, or the maps are to be looked at."""
        now = time.monotonic()
        wait = min(self._scheduler.wake(now) - now, self._look_pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(wait, _LEAST_PAUSE)):
                await self._news.wait()
        self._news.clear()

    def _start(self) -> None:
        now = time.monotonic()
        fetches = self._scheduler.start(now)
        if not fetches:
            return
        self._content.progress.count("second_tries", sum(fetch.hedges is not None for fetch in fetches))
        taken = self._transfers.begin(self._group, fetches)
        if taken:
            self._taken.update(taken)
            self._scheduler.taken(taken, now)
        self._content.progress.connections = len(self._transfers)

    def _transfer_ended(self, fetch: Fetch, outcome: Outcome, queue: int) -> None:
        before = self._scheduler.left_alone
        for loser in self._scheduler.finished(fetch, outcome, time.monotonic(), queue):
            self._transfers.cancel(loser)
        self._content.progress.count("peers_left_alone", self._scheduler.left_alone - before)
        self._news.set()

    async def _origin_refused(self, error: HeadraceError, numbers: Sequence[int], since: int) -> None:
        """The origin's word is final, unless peers have the chunks, or got others while it was asked in vain.

        Args:
            since: how many chunks this run had brought when the origin was asked.
        """
        try:
            answer = await self._cluster.tracker.look(self._swarm, numbers)
        except TrackerUnavailable:
            raise error from None
        held = all(answer.holders.get(number) for number in numbers)
        moving = isinstance(error, OriginUnavailable) and self._content.progress.chunks > since
        if not held and not moving:
            raise error
        self._content.progress.note(f"the origin cannot be read, so other nodes are asked instead: {error}")

    # -- the chunk maps

    def _observe(self) -> None:
        """Tell the policy what the maps show: chunks that are here, are here no more, or that readers wait for."""
        now, changed = time.monotonic(), False
        for at, filling in enumerate(self._fillings):
            whole = filling.done or filling.elsewhere or filling.complete
            states = b"\1" * len(filling.file.grid) if whole else filling.writer.map.states()
            if states != self._seen[at]:
                changed = self._compare(at, states, now) or changed
            if not whole:
                wanted = [self._content.numbering.number(at, index) for index in filling.writer.map.wanted()]
                if fresh := [n for n in wanted if n not in self._wanted]:
                    self._wanted.update(fresh)
                    self._scheduler.want(fresh)
                    changed = True
        if self._taken:
            self._look_after_taken(now)
        self._look_pause = _LOOK_FIRST if changed else min(self._look_pause * 1.5, _LOOK_MOST)

    def _compare(self, at: int, states: bytes, now: float) -> bool:
        start, before = self._content.numbering.starts[at], self._seen[at]
        present, absent = [], []
        for index, (was, state) in enumerate(zip(before, states, strict=True)):
            if state != ABSENT and was == ABSENT:
                present.append(start + index)
            elif state == ABSENT and was != ABSENT:
                absent.append(start + index)
        self._seen[at] = states
        self._taken.difference_update(present)
        self._wanted.difference_update(present)
        if present:
            self._scheduler.present(present, now)
        if absent:
            self._scheduler.absent(absent, now)
        return bool(present or absent)

    def _look_after_taken(self, now: float) -> None:
        """A stager that died, or failed, has let go of its chunks without bringing them."""
        free = []
        for number in self._taken:
            filling, index = self._content.at(number)
            if index not in filling.flying and not filling.writer.claimed(index, index + 1):
                free.append(number)
        self._taken.difference_update(free)
        self._free(free, now)

    def _free(self, numbers: Sequence[int], now: float) -> None:
        absent = [n for n in numbers if not self._present(n)]
        if absent:
            self._scheduler.absent(absent, now)

    def _present(self, number: int) -> bool:
        at, index = self._content.numbering.locate(number)
        return self._seen[at][index] != ABSENT

    # -- this disk

    def _local_chunks(self) -> set[int]:
        """Absent chunks whose published digest another object on this disk has."""
        if self._content.local is None:
            return set()
        found = set()
        for at, filling in enumerate(self._fillings):
            for index, state in enumerate(self._seen[at]):
                if state == ABSENT and self._content.local.has(filling.file, index):
                    found.add(self._content.numbering.number(at, index))
        return found

    def _copy(self, local: set[int]) -> None:
        if not local:
            return
        self._scheduler.taken(sorted(local), time.monotonic())
        chunks = iter(sorted(local))
        for _ in range(_COPIES):
            self._group.create_task(self._transfers.copy_local(chunks, self._copy_failed))

    def _copy_failed(self, number: int) -> None:
        self._observe()
        self._free([number], time.monotonic())
        self._news.set()

    # -- the tracker

    def _ask(self) -> None:
        if self._exchange is None and (request := self._scheduler.ask(time.monotonic())) is not None:
            self._exchange = self._group.create_task(self._say(request))

    async def _say(self, request: Exchange) -> None:
        # Should the answer be lost, these may be claimed.
        said = self._complete(request)
        asked = set(said.wanted) - self._claims if said.claims else set()
        self._claims |= asked
        try:
            answer = await self._cluster.tracker.exchange(self._swarm, said)
        except TrackerUnavailable as error:
            self._content.progress.note(f"the tracker cannot be reached: {error}")
            self._scheduler.unanswered(request, time.monotonic())
        else:
            self._claims -= asked.difference(answer.claimed)
            self._claims.difference_update(request.gained, request.give_back)
            self._count_claims(said, answer.claimed)
            self._vouched.learn(answer.digests)
            self._scheduler.answered(request, answer, time.monotonic())
        finally:
            self._exchange = None
            self._news.set()

    def _count_claims(self, said: Exchange, claimed: Sequence[int]) -> None:
        """Of those that are named again, as long as they are held, the first time counts."""
        progress = self._content.progress
        progress.count("claims_returned", len(self._granted.intersection(said.give_back)))
        self._granted.difference_update(said.gained, said.give_back)
        fresh = set(claimed) - self._granted
        progress.count("claims", len(fresh))
        self._granted |= fresh

    def _complete(self, request: Exchange) -> Exchange:
        """With what the policy knows nothing of: digests, and other stagers of this node."""
        digests = {}
        for number in request.gained:
            if self._vouched.published(number) is None:
                filling, index = self._content.at(number)
                digest = filling.writer.learned.get(index)
                if digest is not None:
                    digests[number] = digest
        # The node's claim may be what another stager of it reads by.
        give_back = tuple(n for n in request.give_back if not self._read_beside(n))
        claims = min(request.claims, self._claims_allowed())
        return replace(request, digests=digests, give_back=give_back, claims=claims)

    def _claims_allowed(self) -> int:
        """No more than are soon read at this job's pace: other nodes wait for what is claimed."""
        rate = self._content.pace.rate("origin")
        if rate is None:
            return MAX_WANTED
        usual = sum(self._content.numbering.sizes) / max(1, self._swarm.chunks)
        most = max(1, int(_CLAIMED * rate / usual)) if rate else 0
        return max(0, most - len(self._claims))

    def _read_beside(self, number: int) -> bool:
        filling, index = self._content.at(number)
        return filling.writer.claimed(index, index + 1)

    async def _say_the_rest(self) -> None:
        """Everything is here: let others know, for as long as that takes a reasonable time."""
        end = time.monotonic() + _FAREWELL
        while not self._scheduler.done and time.monotonic() < end:
            self._observe()
            self._ask()
            await self._pause()

    async def _give_back(self) -> None:
        """What was claimed is here, or another node may read it at once."""
        if not self._claims:
            return
        self._observe()
        gained = tuple(n for n in sorted(self._claims) if self._present(n))
        last = self._complete(Exchange(gained, give_back=tuple(sorted(self._claims.difference(gained)))))
        with suppress(TrackerUnavailable, TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await self._cluster.tracker.exchange(self._swarm, last)
                self._count_claims(last, ())
