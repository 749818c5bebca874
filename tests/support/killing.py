"""Rounds of `kill -9`: stage, be killed, look, go on; and what each round has shown."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.crashes import assert_nothing_wrong, leftovers, marked, overlaps, phase, sent, size_of
from support.faulty_server import FaultyServer
from support.models import CHUNK, stage_small, visible
from support.processes import Ended, Launcher

from headrace.cache.evict import collect
from headrace.cache.store import Store

CONNECTIONS = 4
IN_FLIGHT = CONNECTIONS * CHUNK
"""Bytes that one stager has in flight at most: one span on each connection."""
HEADER = 8 << 10


@dataclass
class Tally:
    """What a campaign has done. `again` are the bytes fetched again of each kill."""

    kills: int = 0
    rounds: int = 0
    checked: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)
    bound: int = 0

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {count}" for name, count in sorted(self.phases.items()))
        most = max(self.again, default=0)
        return (
            f"{self.kills} kills in {self.rounds} rounds; chunks compared {self.checked}, wrong 0; "
            f"fetched again after one kill: at most {most} of {self.bound} bytes in flight; killed while: {phases}"
        )


@dataclass(frozen=True)
class Scene:
    """A model at `<server>/model`, and a root under which each round has a store of its own."""

    launcher: Launcher
    server: FaultyServer
    truth: Mapping[str, bytes]
    root: Path

    @property
    def reference(self) -> str:
        return f"{self.server.url}/model"

    def start(self, root: Path, **more: Any) -> Any:
        return self.launcher.start(
            reference=self.reference, root=root, connections=CONNECTIONS, span=CHUNK, **more
        )

    def duration(self) -> float:
        """Seconds of one staging that nobody disturbs."""
        root = self.root / "undisturbed"
        begun = time.monotonic()
        assert self.start(root).wait().code == 0
        took = time.monotonic() - begun
        shutil.rmtree(root)
        return took


class Round:
    """One store, killed again and again until it is staged.

    After every kill: what may be read is right; nothing that could be read before was fetched since;
    what was fetched and cannot be read is no more than was in flight.
    """

    def __init__(self, scene: Scene, tally: Tally, name: str, *, published: bool, workers: int = 1) -> None:
        self.scene = scene
        self.tally = tally
        self.root = scene.root / name
        self.workers = workers
        # The headers that were read to find the grid, but not yet marked, are in flight too.
        shards = sum(path.endswith(".safetensors") for path in scene.truth)
        self.bound = workers * IN_FLIGHT + (0 if published else shards * HEADER)
        tally.bound = max(tally.bound, self.bound)
        tally.rounds += 1
        scene.server.clear()
        self._had: dict[str, list[tuple[int, int]]] = {}
        self._served = 0
        self._requests = 0

    def kill_after(self, seconds: float) -> bool:
        """Stage for so long; False if that was enough to finish."""
        victim = self.scene.start(self.root, workers=self.workers)
        time.sleep(seconds)
        return self.look(victim.kill())

    def die(self, **how: Any) -> bool:
        """Stage until the process kills itself; False if it did not."""
        return self.look(self.scene.start(self.root, workers=self.workers, **how).wait())

    def look(self, ended: Ended) -> bool:
        """Check everything; whether it was killed before its end."""
        files = self.scene.truth
        log = self.scene.server.log
        served = sent(log[self._requests :], files)
        self._requests = len(log)
        assert overlaps(served, self._had) == [], "what was verified was fetched again"
        self.tally.checked += assert_nothing_wrong(self.root, files)
        now = marked(self.root)
        lost = size_of(served) - (size_of(now) - size_of(self._had))
        assert lost <= self.bound, f"{lost} bytes were lost, {self.bound} may be in flight"
        assert lost >= 0
        for path, spans in self._had.items():
            assert set(spans) <= set(now[path]), f"verified chunks of {path} were forgotten"
        self._had = now
        if not ended.killed:
            assert "error" not in ended.result, ended.result
            return False
        self.tally.again.append(lost)
        self.tally.kills += 1
        self.tally.phases[phase(self.root, len(files))] += 1
        return True

    def finish(self) -> None:
        """The next run completes, byte for byte; what the killed ones left goes with the next collection."""
        files = self.scene.truth
        stage_small(self.scene.reference, self.root)
        assert visible(self.root) == files
        served = sent(self.scene.server.log[self._requests :], files)
        assert overlaps(served, self._had) == []
        assert size_of(served) == sum(map(len, files.values())) - size_of(self._had)
        with Store.open(self.root) as store:
            collect(store, leftover_age=0)
        assert leftovers(self.root) == []
        assert visible(self.root) == files
        shutil.rmtree(self.root)


def random_kills(
    scene: Scene, tally: Tally, seed: int, kills: int, *, published: bool, workers: int = 1
) -> None:
    """Rounds of random kills until there were `kills` more."""
    choose = random.Random(seed)
    longest = scene.duration() * (1.1 if workers == 1 else 1.6)
    wanted = tally.kills + kills
    while tally.kills < wanted:
        one = Round(scene, tally, f"round-{seed}-{tally.rounds}", published=published, workers=workers)
        for _ in range(choose.randint(1, 4)):
            if tally.kills >= wanted:
                break
            killed = one.kill_after(choose.uniform(0, longest))
            # The machine may have become faster or slower meanwhile.
            longest *= 1.1 if killed else 0.8
            if not killed:
                break
        one.finish()
