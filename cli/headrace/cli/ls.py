"""`headrace ls`: the snapshots of a store."""

from __future__ import annotations

import time

import click

from headrace.cache.errors import NotStaged
from headrace.cli.invocation import Invocation, shared
from headrace.cli.table import aligned
from headrace.cli.units import show_age, show_size


@click.command("ls", short_help="List the snapshots in the store.")
@shared
def command(call: Invocation) -> None:
    """List the snapshots in the store."""
    from headrace.cache.inventory import Entry, entry

    found: list[Entry] = []
    with call.store(writable=False) as store:
        domain = call.domain_of(store)
        for snapshot in domain.snapshots():
            try:
                found.append(entry(domain, snapshot))
            except NotStaged:
                continue  # evicted between the two looks
        root = str(store.root)
    found.sort(key=lambda e: -e.last_used)
    rows = [
        (
            one.snapshot[:12],
            show_size(one.bytes),
            "staged" if one.staged else f"{one.present / max(1, one.bytes):.0%}",
            "pinned" if one.pinned is not None else "",
            show_age(time.time() - one.last_used) if one.last_used else "never used",
            ", ".join(one.references) or "-",
        )
        for one in found
    ]
    call.emit(
        {"root": root, "snapshots": [one.as_json() for one in found]},
        aligned([("SNAPSHOT", "SIZE", "STATE", "", "USED", "REFERENCE"), *rows]) if rows else "",
    )
    if not rows:
        call.say(f"nothing is staged in {root}")
