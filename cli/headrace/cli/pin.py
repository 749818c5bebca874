"""`headrace pin`: keep a snapshot from eviction."""

from __future__ import annotations

import click

from headrace.cli.invocation import Invocation, shared, stored_names


@click.command("pin", short_help="Keep a snapshot from rm and gc.")
@click.argument("snapshot", metavar="SNAPSHOT_OR_REFERENCE", shell_complete=stored_names)
@click.option("--reason", default="", metavar="TEXT", help="Why; shown by ls, rm and gc.")
@shared
def command(call: Invocation, snapshot: str, reason: str) -> None:
    """Keep a snapshot from `rm` and `gc` until it is unpinned."""
    from headrace.cache import evict

    with call.store(writable=True) as store:
        _, found = call.find(store, snapshot)
        evict.pin(found, reason)
    call.emit({"snapshot": found.id, "pinned": reason}, f"pinned {found.id[:12]}")
