"""What a new revision of a model moves: bytes fetched from the origin for every byte that changed.

A model of 0.99 GB (290 tensors from norms of 2 KB to an embedding of 272 MB) is published and staged,
then revisions of it, each from a prefix of its own: random tensors adding up to 5 % of the bytes, a
longer header, an added tensor, all three at once, and another division into shards. Claims: at most 1.15
with 4 MiB chunks, at most 2 with 16 MiB. Exit code 1 when a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.measure import machine
from support import revisions
from support.revisions import Revision, Tensor

from headrace.cache.publish import publish
from headrace.cache.staging import stage

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One revision staged where its predecessor was; all but `seconds` in bytes.

    Attributes:
        changed: bytes that are new; 0 where tensors only moved.
        bound: of origin / changed.
    """

    name: str
    chunk: int
    size: int
    changed: int
    origin: int
    local: int
    bound: float
    seconds: float

    @property
    def ratio(self) -> float | None:
        return self.origin / self.changed if self.changed else None

    @property
    def holds(self) -> bool:
        return self.ratio is None or self.ratio <= self.bound


def cases(base: Revision, seeds: int) -> Iterator[tuple[str, Revision, int]]:
    """(name, revision, changed bytes) of every revision to measure."""
    extra = Tensor("model.layers.11.mlp.extra_proj.weight", base.tensors[4].shape)
    for seed in range(seeds):
        yield f"5 % of the bytes, seed {seed}", *revisions.changed(base, 0.05, seed)
    yield "a longer header", *revisions.longer_header(base)
    yield "an added tensor", *revisions.added(base, extra)
    everything, changed = revisions.changed(base, 0.05, seeds)
    everything, _ = revisions.longer_header(everything)
    everything, added = revisions.added(everything, extra)
    yield "all three", everything, changed + added
    yield "four shards", revisions.resharded(base, 4), 0


def measure(scratch: Path, base: Revision, chunk: int, bound: float, seeds: int) -> Iterator[Row]:
    """Publish and stage the base, and after it each revision in a store of its own."""
    origin, store = scratch / "base", scratch / "store"
    base.write(origin)
    first = publish(origin, str(origin), chunk=chunk)
    for name, revision, changed in cases(base, seeds):
        stage(str(origin), root=store)
        revision.write(scratch / "revision")
        published = publish(
            scratch / "revision", str(scratch / "revision"), chunk=chunk, predecessor=first.digest
        )
        report = stage(str(scratch / "revision"), root=store)
        sources = report.sources
        yield Row(
            name, chunk, published.bytes, changed, sources["origin"], sources["local"], bound, report.seconds
        )
        shutil.rmtree(store)
        shutil.rmtree(scratch / "revision")
    shutil.rmtree(origin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tensors and chunks of a sixteenth of the size")
    parser.add_argument("--seeds", type=int, default=0, help="choices of the tensors that change")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    if options.smoke:
        base = revisions.transformer(hidden=256, inner=1376, vocab=9496, layers=24)
    else:
        base = revisions.transformer(hidden=896, inner=4864, vocab=151936, layers=24)
    part = 16 if options.smoke else 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(machine(folder))
        print(f"model: {len(base.tensors)} tensors, {base.size / 1e6:.1f} MB")
        print(
            f"\n{'revision':28}{'chunk':>9}{'changed':>12}{'origin':>12}{'this disk':>12}{'ratio':>8}{'bound':>7}"
        )
        for chunk, bound in ((4 * MIB // part, 1.15), (16 * MIB // part, 2.0)):
            for row in measure(
                Path(folder), base, chunk, bound, options.seeds or (2 if options.smoke else 5)
            ):
                rows.append(row)
                ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
                print(
                    f"{row.name:28}{row.chunk // 1024:>5} KiB{row.changed / 1e6:>9.2f} MB{row.origin / 1e6:>9.2f} MB"
                    f"{row.local / 1e6:>9.1f} MB{ratio:>8}{row.bound:>7.2f}{'' if row.holds else '  exceeded'}",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(
            json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1)
        )
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
