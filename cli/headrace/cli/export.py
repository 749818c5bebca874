"""`headrace export`: write a staged snapshot out as an ordinary folder."""

from __future__ import annotations

from dataclasses import asdict

import click

from headrace.cli.invocation import Invocation, shared, stored_names
from headrace.cli.units import count, show_size


@click.command("export", short_help="Write a snapshot out as a folder.")
@click.argument("snapshot", metavar="SNAPSHOT_OR_REFERENCE", shell_complete=stored_names)
@click.argument("folder", metavar="DIR", type=click.Path())
@shared
def command(call: Invocation, snapshot: str, folder: str) -> None:
    """Make a staged snapshot's files appear in DIR: by reflink, else by copy. The origin is not asked."""
    from headrace.cache.deliver import export
    from headrace.cache.progress import Progress
    from headrace.cli.display import displayed
    from headrace.cli.verify import counting

    with call.store(writable=False) as store:
        _, found = call.find(store, snapshot)
        progress = Progress(total=found.manifest().size, phase="exporting")
        with displayed(call, folder, progress):
            report = export(found, folder, progress=counting(progress))
            progress.phase = "exported"
    call.emit(
        asdict(report),
        f"{report.path}\n  {count(report.files, 'file')}, {show_size(report.bytes)}: "
        f"{show_size(report.reflinked)} by reflink, {show_size(report.copied)} copied, "
        f"{show_size(report.unchanged)} there already",
    )
