"""The calls of a run, written down so that a real tracker can be asked the same."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.simulator.case import Case

from headrace.cache.tracker.protocol import Exchange


@dataclass(frozen=True, slots=True)
class Call:
    """One call: when, by which node, what."""

    at: float
    node: int
    said: Exchange


class Recorder:
    """Writes the calls of one run to a gzipped file of JSON lines, the first of which describes the run."""

    def __init__(self, path: Path, case: Case) -> None:
        self._file = gzip.open(path, "wt", compresslevel=1)  # noqa: SIM115  (closed by __exit__)
        self._write({"nodes": case.nodes, "chunks": len(case.sizes()), "zones": case.zones})

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def said(self, at: float, node: int, said: Exchange) -> None:
        """One call; see `Said`."""
        self._write(
            [
                round(at, 6),
                node,
                said.gained,
                said.lost,
                said.wanted,
                said.claims,
                said.keep,
                said.give_back,
                said.missing,
            ]
        )

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


def recorded(path: Path) -> tuple[dict[str, int], Iterator[Call]]:
    """What a recorded run was, and its calls in order."""
    file = gzip.open(path, "rt")  # noqa: SIM115  (closed by whoever reads to the end)
    described: dict[str, int] = json.loads(file.readline())
    return described, _calls(file)


def _calls(file: Any) -> Iterator[Call]:
    with file:
        for line in file:
            at, node, gained, lost, wanted, claims, keep, give_back, missing = json.loads(line)
            pairs = tuple((chunk, holder) for chunk, holder in missing)
            said = Exchange(
                gained=gained,
                lost=lost,
                wanted=wanted,
                claims=claims,
                keep=keep,
                give_back=give_back,
                missing=pairs,
            )
            yield Call(at, node, said)
