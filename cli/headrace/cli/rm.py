"""`headrace rm`: remove snapshots from the store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from headrace.cli.invocation import Invocation, shared, stored_names
from headrace.cli.units import show_size

if TYPE_CHECKING:
    from headrace.cache.evict import Removed


@click.command("rm", short_help="Remove snapshots.")
@click.argument(
    "snapshots", metavar="SNAPSHOT_OR_REFERENCE...", nargs=-1, required=True, shell_complete=stored_names
)
@click.option("--force", is_flag=True, help="Also what is pinned. What is in use never goes.")
@shared
def command(call: Invocation, snapshots: tuple[str, ...], force: bool) -> None:
    """Remove snapshots, and the objects that no other snapshot needs."""
    from headrace.cache.evict import remove

    gone: list[Removed] = []
    with call.store(writable=True) as store:
        # All of them are looked up before the first is gone: a typo removes nothing.
        found = dict.fromkeys(call.find(store, text)[1].id for text in snapshots)
        domain = call.domain_of(store)
        gone += [remove(store, domain, domain.snapshot(one), force=force) for one in found]
    call.emit({"removed": [asdict(one) for one in gone]}, "\n".join(removed_line(one) for one in gone))


def removed_line(removed: Removed) -> str:
    """One removal, for people."""
    names = f" ({', '.join(removed.names)})" if removed.names else ""
    return f"removed {removed.kind} {removed.id[:12]}{names}: {show_size(removed.bytes)} freed, {removed.why}"
