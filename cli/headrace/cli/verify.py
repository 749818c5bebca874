"""`headrace verify`: read what is staged again, name what is wrong, and repair it if asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from headrace.cache.errors import IntegrityError
from headrace.cli.invocation import Invocation, shared, stored_names, to_stderr
from headrace.cli.units import count, show_size

if TYPE_CHECKING:
    from headrace.cache.progress import Progress
    from headrace.cache.repair import RepairReport
    from headrace.cache.snapshot import Snapshot
    from headrace.cache.store import Domain, Store
    from headrace.cache.verify import VerifyReport


@click.command("verify", short_help="Read what is staged again; --repair fixes it.")
@click.argument("snapshots", metavar="[SNAPSHOT_OR_REFERENCE...]", nargs=-1, shell_complete=stored_names)
@click.option("--repair", "repairing", is_flag=True, help="Fetch what is wrong again, into a new inode.")
@shared
def command(call: Invocation, snapshots: tuple[str, ...], repairing: bool) -> None:
    """Read snapshots (by default all) from disk again and name every chunk that is not what it must be.

    With --repair just those chunks are fetched; readers that have the old file open keep its bytes, and
    are listed. Ends with exit code 20 when something is wrong and was not repaired.
    """
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    wrong = 0
    with call.store(writable=repairing) as store:
        domain = call.domain_of(store)
        found = [call.find(store, text)[1] for text in snapshots] or list(domain.snapshots())
        for snapshot in {one.id: one for one in found}.values():
            report, repaired = _one(call, store, domain, snapshot, repairing)
            wrong += 0 if report.ok or repaired else 1
            results.append({**asdict(report), "ok": report.ok, "repair": repaired and asdict(repaired)})
            lines += _lines(report, repaired)
    result: dict[str, Any] = {"snapshots": results}
    if not wrong:
        call.emit(result, "\n".join(lines))
        return
    code, kind = IntegrityError.exit_code, IntegrityError.__name__
    sentence = f"{count(wrong, 'snapshot')} of {len(results)} did not pass: run `headrace verify --repair`."
    call.emit({**result, "error": {"kind": kind, "message": sentence, "exit_code": code}}, "\n".join(lines))
    to_stderr(f"headrace: {sentence}")
    raise click.exceptions.Exit(code)


def _one(
    call: Invocation, store: Store, domain: Domain, snapshot: Snapshot, repairing: bool
) -> tuple[VerifyReport, RepairReport | None]:
    from headrace.cache.progress import Progress
    from headrace.cache.repair import repair
    from headrace.cache.verify import verify
    from headrace.cli.display import displayed

    progress = Progress(total=snapshot.manifest().size, phase="verifying")
    with displayed(call, snapshot.id[:12], progress):
        report = verify(store, domain, snapshot, progress=counting(progress))
        progress.phase = "verified"
    if report.ok or not repairing:
        return report, None
    call.say(f"repairing {snapshot.id[:12]}")
    return report, repair(store, domain, snapshot, report=report)


def counting(progress: Progress) -> Callable[[int], None]:
    """A function, called from any thread, that adds to what a progress display shows as done."""
    lock = threading.Lock()

    def add(size: int) -> None:
        with lock:
            progress.present += size

    return add


def _lines(report: VerifyReport, repaired: RepairReport | None) -> list[str]:
    state = "good" if report.ok else "repaired" if repaired else "BAD"
    part = "" if report.complete else ", as far as it is staged"
    lines = [
        f"{report.snapshot[:12]}: {state}: {count(report.files, 'file')}, {show_size(report.bytes)} read{part}"
    ]
    lines += [f"  {b.path}, chunk {b.index}, bytes {b.start} to {b.stop}: {b.why}" for b in report.bad]
    lines += [f"  {one.path}: {one.why}" for one in report.damaged]
    lines += [f"  {path}: nothing is known to compare it with" for path in report.unknown]
    if repaired is not None:
        got = ", ".join(f"{show_size(size)} from {name}" for name, size in repaired.sources.items() if size)
        lines.append(f"  repaired: {got or 'nothing had to be fetched'}")
        lines += [
            f"  process {one.pid} ({one.command}) still reads the old bytes" for one in repaired.holders.found
        ]
    return lines
