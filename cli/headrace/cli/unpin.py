"""`headrace unpin`: let a snapshot be evicted again."""

from __future__ import annotations

import click

from headrace.cli.invocation import Invocation, shared, stored_names


@click.command("unpin", short_help="Let rm and gc have a snapshot again.")
@click.argument("snapshot", metavar="SNAPSHOT_OR_REFERENCE", shell_complete=stored_names)
@shared
def command(call: Invocation, snapshot: str) -> None:
    """Take a pin away; not an error where there is none."""
    from headrace.cache import evict

    with call.store(writable=True) as store:
        _, found = call.find(store, snapshot)
        evict.unpin(found)
    call.emit({"snapshot": found.id, "pinned": None}, f"unpinned {found.id[:12]}")
