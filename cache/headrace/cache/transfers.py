"""The transfers of one staging run: chunks from peers, from the origin, and from this disk, into the store.

A transfer has its chunk claimed first (see `landing`) and says at its end how it went. Adjacent chunks from the
origin are read by one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.cache.chunkmap import ABSENT
from headrace.cache.cluster import Cluster
from headrace.cache.errors import (
    ClusterError,
    HeadraceError,
    NotAuthenticated,
    OtherVersion,
    PeerBusy,
    PeerMissing,
)
from headrace.cache.fetching import Pools
from headrace.cache.filling import ChunkSink, Corrupt, Filling
from headrace.cache.kin import Found, Kin
from headrace.cache.landing import Landing, LandingSink, MemorySink
from headrace.cache.numbering import Numbering
from headrace.cache.pace import Pace
from headrace.cache.policy.fetch import Fetch, Outcome
from headrace.cache.progress import Progress
from headrace.cache.sources import ChunkSource
from headrace.cache.threads import stoppable
from headrace.cache.tracker.protocol import Peer
from headrace.cache.vouched import Vouched

_KIN_TRIES = 2


@dataclass(frozen=True, slots=True)
class Content:
    """What is staged, and with what.

    Attributes:
        fillings: by object id, all of the numbering.
        local: bytes of this disk by published digest; None: there is nothing to look for.
        span: bytes that one request to the origin brings, at most.
    """

    domain: str
    uri: str | None
    numbering: Numbering
    fillings: Mapping[str, Filling]
    origin: ChunkSource
    local: ChunkSource | None
    progress: Progress
    pools: Pools
    pace: Pace
    span: int

    def at(self, number: int) -> tuple[Filling, int]:
        """A chunk's object, and its index there."""
        at, index = self.numbering.locate(number)
        return self.fillings[self.numbering.ids[at]], index


@dataclass(eq=False)
class _Run:
    """One transfer under way: one fetch, or the fetches of adjacent chunks from the origin.

    Attributes:
        direct: whether it writes into the file as bytes come.
        settled: chunks (indexes) that it brought.
        told: fetches (numbers) whose end was said.
        started: whether its task runs; one that never did could not clean up.
    """

    fetches: Sequence[Fetch]
    landings: Sequence[Landing]
    direct: bool
    task: asyncio.Task[None] | None = None
    settled: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    started: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            if self.started and self.task is not None:
                self.task.cancel()


class Transfers:
    """Runs transfers; used from one event loop."""

    def __init__(
        self,
        cluster: Cluster,
        content: Content,
        vouched: Vouched,
        kin: Kin,
        *,
        ended: Callable[[Fetch, Outcome, int], None],
        refused: Callable[[HeadraceError, Sequence[int], int], Awaitable[None]],
    ) -> None:
        """
        Args:
            ended: told how each fetch ended, and how many uploads its peer had.
            refused: told what the origin's last word was about some chunks, and how many chunks the run had
                brought when it asked; raises it where that is the end.
        """
        self._cluster = cluster
        self._content = content
        self._vouched = vouched
        self._kin = kin
        self._ended = ended
        self._refused = refused
        self._landings: dict[int, Landing] = {}
        self._runs: dict[int, _Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    # -- beginning

    def begin(self, group: asyncio.TaskGroup, fetches: Sequence[Fetch]) -> list[int]:
        """Begin transfers; the chunks that another stager of this node has claimed, whose fetches ended at once."""
        taken: list[int] = []
        from_origin: list[Fetch] = []
        for fetch in fetches:
            # Whoever may read a chunk from the origin may as well take it from kin, one by one.
            if fetch.peer is None and fetch.chunk not in self._landings and not self._kin.has(fetch.chunk):
                from_origin.append(fetch)
            else:
                self._begin(group, [fetch], taken)
        for run in self._adjacent(from_origin):
            self._begin(group, run, taken)
        return taken

    def _adjacent(self, fetches: Iterable[Fetch]) -> list[list[Fetch]]:
        """Chunks that one request to the origin can bring together."""
        runs: list[list[Fetch]] = []
        sizes, numbering = self._content.numbering.sizes, self._content.numbering
        size = 0
        for fetch in sorted(fetches, key=lambda f: f.chunk):
            last = runs[-1][-1].chunk if runs else -1
            size += sizes[fetch.chunk]
            joins = fetch.chunk == last + 1 and size <= self._content.span
            if joins and numbering.locate(last)[0] == numbering.locate(fetch.chunk)[0]:
                runs[-1].append(fetch)
            else:
                runs.append([fetch])
                size = sizes[fetch.chunk]
        return runs

    def _begin(self, group: asyncio.TaskGroup, fetches: Sequence[Fetch], taken: list[int]) -> None:
        landings = self._land(fetches)
        if landings is None and len(fetches) > 1:
            for fetch in fetches:
                self._begin(group, [fetch], taken)
            return
        if landings is None:
            filling, index = self._content.at(fetches[0].chunk)
            if filling.writer.map.state(index) == ABSENT:
                taken.append(fetches[0].chunk)
            self._ended(fetches[0], Outcome.CANCELLED, 0)
            return
        run = _Run(fetches, landings, direct=not landings[0].direct)
        for landing in landings:
            landing.users += 1
            landing.direct = True
        for fetch in fetches:
            self._runs[fetch.number] = run
        run.task = group.create_task(self._run(run))

    def _land(self, fetches: Sequence[Fetch]) -> list[Landing] | None:
        """The landings of adjacent chunks, claimed; None: another stager of this node has one, or has been faster."""
        first = fetches[0].chunk
        if len(fetches) == 1 and first in self._landings:
            return [self._landings[first]]
        filling, index = self._content.at(first)
        if not filling.claim(index, index + len(fetches)):
            return None
        landings = [Landing(filling, index + i) for i in range(len(fetches))]
        self._landings.update((f.chunk, landing) for f, landing in zip(fetches, landings, strict=True))
        return landings

    def cancel(self, fetch: Fetch) -> None:
        """End a transfer whose chunk came by another."""
        run = self._runs.get(fetch.number)
        # One of several chunks of a request is just dropped when it comes.
        if run is not None and len(run.fetches) == 1:
            run.cancel()

    def cancel_origin(self) -> None:
        """End all reading of the origin."""
        for run in {id(run): run for run in self._runs.values()}.values():
            if run.fetches[0].peer is None:
                run.cancel()

    # -- running

    async def _run(self, run: _Run) -> None:
        fetch = run.fetches[0]
        outcome, queue = Outcome.CANCELLED, 0
        run.started = True
        try:
            if run.cancelled:
                pass
            elif fetch.peer is not None:
                outcome, queue = await self._from_peer(run, fetch)
            elif self._kin.has(fetch.chunk) and await self._from_kin(run, fetch.chunk):
                outcome = Outcome.DONE
            else:
                outcome = await self._from_origin(run)
        finally:
            self._leave(run)
            for one, landing in zip(run.fetches, run.landings, strict=True):
                if one.number in run.told:
                    continue
                run.told.add(one.number)
                if landing.index in run.settled:
                    self._ended(one, Outcome.DONE, queue)
                else:
                    # Right, and too late: another transfer was faster.
                    self._ended(one, Outcome.CANCELLED if outcome is Outcome.DONE else outcome, queue)
        content = self._content
        await run.landings[0].filling.sync_sometimes(content.pools.syncing, content.pools.cancel)

    def _leave(self, run: _Run) -> None:
        for fetch, landing in zip(run.fetches, run.landings, strict=True):
            self._runs.pop(fetch.number, None)
            landing.users -= 1
            if run.direct:
                landing.direct = False
            if not landing.users:
                self._landings.pop(fetch.chunk, None)
                landing.filling.release(landing.index, landing.index + 1)

    async def _from_peer(self, run: _Run, fetch: Fetch) -> tuple[Outcome, int]:
        assert fetch.peer is not None
        at, index = self._content.numbering.locate(fetch.chunk)
        object_id = self._content.numbering.ids[at]
        try:
            digest = self._vouched.of(fetch.chunk)
            if digest is None:
                digest = await self._ask_digest(fetch.peer, object_id, index)
            return Outcome.DONE, await self._read_peer(run, fetch.peer, object_id, index, digest)
        except PeerBusy as busy:
            return Outcome.BUSY, busy.queue
        except PeerMissing:
            return Outcome.MISSING, 0
        except Corrupt:
            self._content.progress.note(
                f"the node {fetch.peer.address} sent wrong bytes, which were thrown away: it is left alone for a while."
            )
            return Outcome.CORRUPT, 0
        except ClusterError as error:
            self._note_refusal(error)
            return Outcome.FAILED, 0

    async def _ask_digest(self, peer: Peer, object_id: str, index: int) -> bytes:
        """Where nobody else vouches for a chunk, its holder does: against accidents on the way, no more."""
        found = await self._cluster.client.digests(peer, self._content.domain, object_id, index, index + 1)
        return found[0]

    async def _read_peer(self, run: _Run, peer: Peer, object_id: str, index: int, digest: bytes) -> int:
        """One chunk of a peer's object into the run's landing; how many uploads the peer had.

        Raises:
            Corrupt: it has another digest.
            ClusterError: as `PeerClient.read_to`.
        """
        content, (landing,) = self._content, run.landings
        length = landing.filling.file.grid.lengths[landing.index]

        def landed(index: int, _: bytes) -> None:
            run.settled.add(index)

        sink: LandingSink | MemorySink
        if run.direct:
            sink = LandingSink(
                run.landings, content.progress, "peer", content.pace, expected=[digest], landed=landed
            )
        else:
            sink = MemorySink(landing, content.progress, "peer", content.pace, expected=digest, landed=landed)
        reading = self._cluster.client.read_to(
            peer, content.domain, object_id, index, index + 1, length, sink.put, demand=content.pace.demand
        )
        return await stoppable(reading, sink.stop)

    async def _from_kin(self, run: _Run, number: int) -> bool:
        """Take a chunk from a node that holds another snapshot with it; False: not to be had so."""
        try:
            found = await self._kin.find(number)
        except ClusterError:
            found = None
        for peer in found.holders[:_KIN_TRIES] if found is not None else ():
            if found is not None and await self._from_relative(run, number, found, peer):
                return True
        self._kin.failed(number)
        return False

    async def _from_relative(self, run: _Run, number: int, found: Found, peer: Peer) -> bool:
        place = found.place
        try:
            digest = self._vouched.of(number) or found.digest
            if digest is None:
                digest = await self._ask_digest(peer, place.object_id, place.index)
            await self._read_peer(run, peer, place.object_id, place.index, digest)
            return True
        except Corrupt:
            return False
        except ClusterError as error:
            self._note_refusal(error)
            return False

    async def _from_origin(self, run: _Run) -> Outcome:
        content, first = self._content, run.landings[0]
        filling, numbers = first.filling, [fetch.chunk for fetch in run.fetches]
        fetches = {landing.index: f for landing, f in zip(run.landings, run.fetches, strict=True)}
        loop = asyncio.get_running_loop()

        def landed(index: int, digest: bytes) -> None:
            run.settled.add(index)
            loop.call_soon_threadsafe(self._read, run, fetches[index], digest)

        sink = LandingSink(
            run.landings,
            content.progress,
            "origin",
            content.pace,
            expected=[self._vouched.published(number) for number in numbers],
            landed=landed,
        )
        last = first.index + len(numbers)
        since = content.progress.chunks
        try:
            reading = content.origin.read_to(filling.file, first.index, last, sink.put, content.pools.writing)
            await stoppable(reading, sink.stop)
        except Corrupt as bad:
            filling.count_corrupt(bad.index, content.uri)
            return Outcome.CORRUPT
        except HeadraceError as error:
            left = [f.chunk for index, f in fetches.items() if index not in run.settled]
            await self._refused(error, left, since)
            return Outcome.FAILED
        return Outcome.DONE

    def _read(self, run: _Run, fetch: Fetch, digest: bytes) -> None:
        """A chunk came from the origin; others may have it at once, while the rest of the request still comes."""
        if fetch.number in run.told:
            return
        if self._vouched.contradicted(fetch.chunk, digest):
            self._content.progress.note(
                f"other nodes have another digest for chunk {fetch.chunk} than the origin's bytes: the origin counts."
            )
        run.told.add(fetch.number)
        self._ended(fetch, Outcome.DONE, 0)

    def _note_refusal(self, error: ClusterError) -> None:
        """What will not pass by itself is said."""
        if isinstance(error, NotAuthenticated | OtherVersion):
            self._content.progress.note(f"another node and this one do not work together: {error}")

    # -- this disk

    async def copy_local(self, numbers: Iterable[int], failed: Callable[[int], None]) -> None:
        """Copy chunks from other objects on this disk; `failed` is told of those that were not there after all."""
        content = self._content
        assert content.local is not None
        for number in numbers:
            filling, index = content.at(number)
            if not filling.claim(index, index + 1):
                failed(number)
                continue
            sink = ChunkSink(filling, index, content.progress, "local", content.pace)
            try:
                reading = content.local.read_to(
                    filling.file, index, index + 1, sink.put, content.pools.writing
                )
                await stoppable(reading, sink.stop)
            except (Corrupt, HeadraceError):
                failed(number)
            finally:
                filling.release(index, index + 1)
