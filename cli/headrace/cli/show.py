"""`headrace show`: the store that is used, or one of its snapshots."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from headrace.cli.invocation import Invocation, shared, stored_names
from headrace.cli.units import count, show_age, show_size


@click.command("show", short_help="Show the store, or one of its snapshots.")
@click.argument("snapshot", metavar="[SNAPSHOT_OR_REFERENCE]", required=False, shell_complete=stored_names)
@shared
def command(call: Invocation, snapshot: str | None) -> None:
    """Show which store is used and what is in it, or a snapshot: its files and their digests."""
    if snapshot is None:
        _show_store(call)
    else:
        _show_snapshot(call, snapshot)


def _show_store(call: Invocation) -> None:
    from headrace.cache import disk
    from headrace.cache.store import FORMAT, Store, default_root

    settings = call.settings()
    root = Path(call.root or settings.root or default_root()).absolute()
    exists = (root / "format").exists()
    nearest = next(p for p in (root, *root.parents) if p.exists())
    result: dict[str, Any] = {
        "root": str(root),
        "chosen_by": _chosen_by(call, settings.root),
        "exists": exists,
        "format": FORMAT if exists else None,
        "filesystem": disk.filesystem(nearest).kind,
        "free_bytes": disk.free_bytes(nearest),
        "domains": {},
    }
    if exists:
        with Store.open(root, writable=False) as store:
            for domain in store.domains():
                snapshots = list(domain.snapshots())
                staged = sum(1 for s in snapshots if s.complete)
                result["domains"][domain.name] = {"snapshots": len(snapshots), "staged": staged}
    lines = [
        result["root"],
        f"  chosen by {result['chosen_by']}",
        f"  on {result['filesystem']}, {show_size(result['free_bytes'])} free",
    ]
    lines += [
        f"  {name}: {count(d['snapshots'], 'snapshot')}, {d['staged']} staged"
        for name, d in result["domains"].items()
    ] or ["  nothing was staged here yet"]
    call.emit(result, "\n".join(lines))


def _chosen_by(call: Invocation, configured: str | None) -> str:
    from headrace.cache.store import NODE_ROOT, default_root

    if call.root:
        return "--root"
    if os.environ.get("HEADRACE_ROOT"):
        return "$HEADRACE_ROOT"
    if configured:
        return "the configuration file"
    if default_root() == NODE_ROOT:
        return "default: the node's store, which this user may write"
    return "default: the user's cache, as this user may not write the node's store"


def _show_snapshot(call: Invocation, text: str) -> None:
    from headrace.cache.inventory import entry, present_bytes

    with call.store(writable=False) as store:
        domain, snapshot = call.find(store, text)
        facts = entry(domain, snapshot)
        manifest = snapshot.manifest()
        files = [
            {
                "path": file.path,
                "bytes": file.size,
                "present": file.size if facts.staged else present_bytes(domain, manifest, file),
                "chunks": len(file.grid.lengths),
                "content_key": file.content_key(manifest.uri, manifest.algorithm),
                "object": manifest.object_id(domain.name, file),
            }
            for file in manifest.files
        ]
    result = {
        **facts.as_json(),
        "domain": domain.name,
        "uri": manifest.uri,
        "revision": manifest.revision,
        "manifest": manifest.digest,
        "predecessor": manifest.predecessor,
        "algorithm": manifest.algorithm,
        "contents": files,
    }
    state = "staged" if facts.staged else f"{show_size(facts.present)} of {show_size(facts.bytes)} staged"
    origin = "signed manifest" if facts.signed else "published manifest" if facts.published else "listing"
    used = show_age(time.time() - facts.last_used) if facts.last_used else "never"
    lines = [
        f"snapshot {facts.snapshot}",
        f"  {state}, {count(facts.files, 'file')}, {show_size(facts.bytes)}, {manifest.algorithm}",
        f"  from {manifest.uri or '-'}{'@' + manifest.revision if manifest.revision else ''} ({origin})",
        *(f"  known as {name}" for name in facts.references),
        f"  used {used}"
        + (f", pinned: {facts.pinned or 'no reason given'}" if facts.pinned is not None else ""),
        f"  {facts.path}",
        *(
            f"    {show_size(f.size):>8}  {f.path}  {f.content_key(manifest.uri, manifest.algorithm)[:24]}…"
            for f in manifest.files
        ),
    ]
    call.emit(result, "\n".join(lines))
