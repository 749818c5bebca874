"""Hold records: one small file per published volume, synced before its mount, removed after.

A reader in a process holds its snapshot by a flock instead (`Snapshot.hold`), which dies with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from headrace.cache.durable import sync_dir, write_file
from headrace.cache.paths import check_path
from headrace.cache.store import Store


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """Why a snapshot of a domain must stay: the volume `id`, and its `holder` in words."""

    id: str
    domain: str
    snapshot: str
    holder: str


def add(store: Store, record: HoldRecord) -> None:
    """Write the record; it is durable on return."""
    check_path(record.id, "the hold")
    write_file(store.root / "holds" / record.id, json.dumps(asdict(record)).encode())


def remove(store: Store, hold_id: str) -> None:
    """Remove the record; not an error when it is gone."""
    (store.root / "holds" / check_path(hold_id, "the hold")).unlink(missing_ok=True)
    sync_dir(store.root / "holds")


def records(store: Store) -> Iterator[HoldRecord]:
    for entry in sorted(os.scandir(store.root / "holds"), key=lambda e: e.name):
        if not entry.name.startswith("."):
            with open(entry.path, "rb") as file:
                yield HoldRecord(**json.load(file))
