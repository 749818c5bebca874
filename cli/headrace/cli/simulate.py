"""`headrace simulate`: models a cluster with the agents' own policy; part of the source checkout, as benchmarks are."""

from __future__ import annotations

import click

from headrace.cli.bench import BenchmarkFailed, benchmarks, run


@click.command(
    "simulate",
    short_help="Model a cluster of 10 to 10,000 nodes (source checkout).",
    context_settings={
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Model a cluster: see `headrace simulate --help`, which `benchmarks/simulate.py` answers itself."""
    failed = run(benchmarks() / "simulate.py", arguments)
    if failed:
        raise BenchmarkFailed(failed)
