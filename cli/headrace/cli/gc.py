"""`headrace gc`: collect leftovers, and the least recently used snapshots over a limit."""

from __future__ import annotations

from dataclasses import asdict

import click

from headrace.cli.invocation import Invocation, shared, size_option
from headrace.cli.units import show_size


@click.command("gc", short_help="Remove leftovers, or down to a size.")
@size_option("--max-bytes", "Bring the store down to this size, e.g. 500GB.")
@click.option(
    "--leftover-age",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long incomplete snapshots that nobody stages are let be. [default: 3600]",
)
@shared
def command(call: Invocation, max_bytes: int | None, leftover_age: float | None) -> None:
    """Remove what no snapshot needs; with --max-bytes also the least recently used snapshots.

    What is pinned, read, staged or published as a volume stays.
    """
    from headrace.cache.evict import LEFTOVER_AGE, collect
    from headrace.cli.rm import removed_line

    with call.store(writable=True) as store:
        age = LEFTOVER_AGE if leftover_age is None else leftover_age
        report = collect(store, max_bytes=max_bytes, leftover_age=age)
    lines = [removed_line(one) for one in report.removed]
    lines += [f"kept {kept.id[:12]} ({', '.join(kept.names) or '-'}): {kept.why}" for kept in report.kept]
    lines.append(f"the store has {show_size(report.after)}, it had {show_size(report.before)}")
    if report.excess:
        lines.append(f"{show_size(report.excess)} over the limit could not be freed")
    call.emit(asdict(report), "\n".join(lines))
