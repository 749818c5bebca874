"""One case: ours and its rivals, repetition by repetition, and what came of it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import AUTOPILOT, FIXED, Against, Bound, Case
from benchmarks.measure import GB, Interval, interval
from benchmarks.models import write_model, write_small
from benchmarks.peers import LOADERS, Loader
from benchmarks.places import PLACES, STATES, Place, Unavailable, bring
from benchmarks.repetition import Failed, Outcome, repeat

from headrace.cache.safetensors import TensorInfo, read_header
from headrace.loader.digest import tensors_digest

PAIRS, SMOKE_PAIRS = 15, 2
OTHER_ROUNDS = 3
FAR = 2.0
SMALL, SMALL_SMOKE = 20_000, 1_000
_WRITE_SHARDS = 4


@dataclass
class Row:
    """The repetitions of one loader, or why there are none."""

    outcomes: list[Outcome] = field(default_factory=list)
    absent: str | None = None

    def figure(self, what: str, size: int) -> list[float]:
        """One value for each repetition: wall, rate, cpu (s/GB), device (of the model), faults, beyond (bytes),
        outside (s)."""
        if what == "wall":
            return [o.cost.wall for o in self.outcomes]
        if what == "rate":
            return [size / GB / o.cost.wall for o in self.outcomes]
        if what == "cpu":
            return [o.cost.cpu * GB / size for o in self.outcomes]
        if what == "device":
            return [o.device_bytes / size for o in self.outcomes]
        if what == "outside":
            return [o.notes["outside"] for o in self.outcomes if "outside" in o.notes]
        return [float(getattr(o, what)) for o in self.outcomes]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim and what was found."""

    text: str
    found: Interval
    limit: float
    upper: bool = False

    @property
    def met(self) -> bool:
        return (self.found.high if self.upper else self.found.median) <= self.limit

    @property
    def words(self) -> str:
        if not self.met:
            return "NOT MET"
        return "met" if self.found.high <= self.limit else "met by the median, not by the whole interval"


@dataclass
class Result:
    """A case that was run."""

    case: Case
    size: int
    pairs: int
    state: str
    rows: dict[str, Row] = field(default_factory=dict)
    paired: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self) -> dict[str, Interval]:
        """ours / rival, in time."""
        return {rival: interval(values) for rival, values in self.paired.items() if values}

    def best_fixed(self) -> str | None:
        """The fixed read path with the least median time."""
        there = [name for name in FIXED if self.rows.get(name, Row()).outcomes]
        return min(
            there, key=lambda name: statistics.median(self.rows[name].figure("wall", self.size)), default=None
        )

    def near(self, rivals: Sequence[str]) -> list[str]:
        """Those that came within `FAR` x the best of them: the others will not be the best."""
        walls = {name: self.rows[name].figure("wall", self.size) for name in rivals}
        limit = FAR * min((statistics.median(values) for values in walls.values()), default=0.0)
        return [name for name, values in walls.items() if min(values, default=0.0) <= limit]

    def verdicts(self) -> Iterator[Verdict]:
        """Of the claims that could be tried."""
        ratios = self.ratios()
        claims: tuple[Against, ...] = self.case.claims
        best = self.best_fixed()
        if self.case.autopilot and best is not None:
            claims = (Against(best, AUTOPILOT),)
        for claim in claims:
            if claim.rival in ratios:
                upper = ", upper end of the interval" if claim.upper else ""
                text = f"{self.case.ours} / {claim.rival} <= {claim.limit:.3g}{upper}"
                yield Verdict(text, ratios[claim.rival], claim.limit, claim.upper)
        for bound in self.case.bounds:
            values = self.rows[self.case.ours].figure(bound.what, self.size)
            if values:
                yield _verdict(bound, values)

    def table(self) -> str:
        """Everything, for people."""
        case, ratios = self.case, self.ratios()
        lines = [
            f"{case.name}: {case.title}; {self.size / GB:.2f} GB, {self.state}, {self.pairs} pairs",
            f"  {'loader':18} {'n':>3} {'seconds':>22} {'GB/s':>6} {'CPU s/GB':>8} {'device':>6} {'faults':>8} "
            f"{'beyond MB':>9} {case.ours + ' / it':>26}",
        ]
        for name, row in self.rows.items():
            if row.absent is not None or not row.outcomes:
                lines.append(f"  {name:18} {row.absent or 'did not come to it'}")
                continue
            middle = {
                what: statistics.median(row.figure(what, self.size))
                for what in ("rate", "cpu", "device", "faults", "beyond")
            }
            ratio = str(ratios[name]) if name in ratios else ""
            lines.append(
                f"  {name:18} {len(row.outcomes):>3} {interval(row.figure('wall', self.size))!s:>22} "
                f"{middle['rate']:6.2f} {middle['cpu']:8.3f} {middle['device']:6.2f} {middle['faults']:8.0f} "
                f"{middle['beyond'] / 1e6:9.1f} {ratio:>26}"
            )
        for name in [n for n in self.rows if n.startswith("headrace") and self.rows[n].outcomes]:
            for words, count in _explained(self.rows[name]).items():
                lines.append(f"  {name}: {words} ({count} of {len(self.rows[name].outcomes)})")
            if peaks := [
                o.notes["device_peak"] for o in self.rows[name].outcomes if "device_peak" in o.notes
            ]:
                lines.append(f"  {name}: device memory at most {max(peaks) / self.size:.3f} x the model")
        lines += [f"  claim {v.text}: {v.found} {v.words}" for v in self.verdicts()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        keys = ("wall", "cpu", "device", "faults", "beyond", "outside")
        return {
            "title": self.case.title,
            "bytes": self.size,
            "state": self.state,
            "ours": self.case.ours,
            "loaders": {
                name: {"absent": row.absent}
                if row.absent is not None
                else {
                    **{key: row.figure(key, self.size) for key in keys},
                    "returned": [o.returned for o in row.outcomes],
                    "notes": [o.notes for o in row.outcomes],
                }
                for name, row in self.rows.items()
            },
            "ratios": {name: found.as_dict() for name, found in self.ratios().items()},
            "claims": [
                {"claim": v.text, **v.found.as_dict(), "limit": v.limit, "verdict": v.words}
                for v in self.verdicts()
            ],
        }


def _verdict(bound: Bound, values: Sequence[float]) -> Verdict:
    scale = 1e6 if bound.what == "beyond" else 1.0
    limit = bound.limit / scale
    return Verdict(f"{bound.unit} <= {limit:g}", interval([value / scale for value in values]), limit)


def _explained(row: Row) -> dict[str, int]:
    """What the read paths were and why, without the files' names."""
    found: dict[str, int] = {}
    for outcome in row.outcomes:
        reasons = sorted({text.partition(": ")[2] for text in outcome.notes.get("explain", ())})
        words = f"{outcome.notes.get('read_path')}; {' | '.join(reasons[:2])}"
        found[words] = found.get(words, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1])[:3])


@dataclass
class Contest:
    """Runs a case.

    Attributes:
        size: bytes of the model that the case takes a part of.
        pairs: 0 for as many as usual.
        only: no other rivals than these.
        seconds: after the first repetitions, when no further pair is begun; 0 for no such end.
        result: what there is so far.
    """

    case: Case
    device: str
    size: int
    pairs: int
    smoke: bool
    only: Sequence[str] | None = None
    seconds: float = 0.0
    result: Result | None = None

    def run(self, scratch: Path) -> Result:
        """Run it.

        Raises:
            Unavailable: this machine cannot.
            Failed: ours could not do it.
        """
        case = self.case
        pairs = self.pairs or (SMOKE_PAIRS if self.smoke else max(PAIRS, case.least))
        expected = self._expected
        state = STATES[case.state]
        with ExitStack() as stack:
            place = stack.enter_context(PLACES[case.place](scratch, expected, self._write))
            stack.callback(place.keeping.close)
            holds = bring(place, state, anew=True)
            result = Result(case, place.size, pairs, f"{state.name} ({holds:.0%} in the page cache)")
            self.result = result
            round_ = _Round(self, place, scratch, result)
            rivals, others = self._admit(result)
            round_.first([case.ours, *rivals, *others])
            rivals = [name for name in rivals if result.rows[name].absent is None]
            others = [name for name in others if result.rows[name].absent is None]
            begin = time.monotonic()
            for number in range(pairs):
                if case.autopilot and number == OTHER_ROUNDS:
                    rivals = result.near(rivals)
                if number >= SMOKE_PAIRS and self.seconds and time.monotonic() > begin + self.seconds:
                    result.pairs = number
                    break
                for trio in _trios(case.ours, rivals, number):
                    round_.run(trio)
                if number < (1 if self.smoke else OTHER_ROUNDS):
                    for name in others:
                        round_.run([name])
        return result

    @property
    def _expected(self) -> int:
        return self.size if self.smoke else int(self.size * self.case.part)

    def _write(self, model: Path) -> None:
        if self.case.small:
            write_small(model, SMALL_SMOKE if self.smoke else SMALL)
        else:
            hidden = 512 if self.smoke else 2048
            write_model(model, self._expected, shards=_WRITE_SHARDS, hidden=hidden)

    def _admit(self, result: Result) -> tuple[list[str], list[str]]:
        """Rivals (in every pair) and others (in the table) that can take part; rows for all."""
        case = self.case
        rivals = [claim.rival for claim in case.claims] + (list(FIXED) if case.autopilot else [])
        others = list(case.others)
        if self.only is not None:
            rivals = [name for name in (*rivals, *others) if name in self.only]
            others = []
        for name in (case.ours, *rivals, *others):
            result.rows[name] = Row(absent=LOADERS[name].absent(self.device))
        if (missing := result.rows[case.ours].absent) is not None:
            raise Unavailable(missing)
        there = [name for name, row in result.rows.items() if row.absent is None]
        return [n for n in rivals if n in there], [n for n in others if n in there]


def _trios(ours: str, rivals: Sequence[str], number: int) -> Iterator[list[str]]:
    """[rival, ours, rival], each next to ours; what comes first changes with every round."""
    for at in range(0, len(rivals), 2):
        trio = [rivals[at], ours, *rivals[at + 1 : at + 2]]
        yield trio if number % 2 else trio[::-1]
    if not rivals:
        yield [ours]


@dataclass
class _Round:
    contest: Contest
    place: Place
    scratch: Path
    result: Result

    def first(self, names: Sequence[str]) -> None:
        """The first repetition of each is dropped; all must have brought the same tensors."""
        infos: dict[str, TensorInfo] = {}
        for path in self.place.model.glob("*.safetensors"):
            infos.update(read_header(path).tensors)
        found: dict[str, str] = {}
        for name in names:
            outcome = self._once(name, infos)
            if outcome is not None and outcome.digest is not None:
                found[name] = outcome.digest
        if len(set(found.values())) > 1:
            raise Failed(f"not everybody loaded the same tensors: {found}")

    def run(self, names: Sequence[str]) -> None:
        """One repetition of each, and the ratios of neighbours."""
        ours = self.contest.case.ours
        outcomes = {name: self._once(name) for name in names}
        for name, outcome in outcomes.items():
            if outcome is None:
                continue
            self.result.rows[name].outcomes.append(outcome)
            mine = outcomes.get(ours)
            if name != ours and mine is not None:
                self.result.paired.setdefault(name, []).append(mine.cost.wall / outcome.cost.wall)

    def _once(self, name: str, infos: dict[str, TensorInfo] | None = None) -> Outcome | None:
        contest, place = self.contest, self.place
        loader, done = LOADERS[name], self.result.rows[name].outcomes
        bring(place, STATES[contest.case.state])
        try:
            return repeat(
                lambda: loader.prepare(place.model, contest.device),
                # Who maps takes no memory; giving some back just before would only slow it down.
                room=done[-1].private if done else place.size,
                destination=place.size if contest.device == "cpu" else 0,
                files=place.files,
                environ=self._environ(loader),
                group=place.group,
                digest=None if infos is None else lambda tensors: tensors_digest(tensors, infos),
            )
        except Failed as reason:
            if name == contest.case.ours:
                raise
            self.result.rows[name].absent = f"failed: {reason}"
            return None

    def _environ(self, loader: Loader) -> dict[str, str]:
        # What loads learn of devices stays here: it is theirs from the first repetition on.
        return {**loader.environ, "XDG_CACHE_HOME": os.fspath(self.scratch / "caches")}
