"""`headrace stage`: bring snapshots into the store, and into folders if asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from headrace.cache.errors import UsageError
from headrace.cli.invocation import Invocation, shared, size_option
from headrace.cli.through_agent import agent_option, staging_job
from headrace.cli.units import count, show_seconds, show_size

if TYPE_CHECKING:
    from headrace.cache.prepare import StageRequest
    from headrace.cache.progress import Progress
    from headrace.cache.staging import StageReport


@click.command("stage", short_help="Stage models, verified, onto local disk.")
@click.argument("paths", metavar="SRC [DST [SRC DST ...]]", nargs=-1, required=True)
@click.option("--include", metavar="GLOB", multiple=True, help="Only files that fit; repeatable.")
@click.option("--ignore", metavar="GLOB", multiple=True, help="No files that fit; repeatable.")
@click.option("--revalidate", metavar="WHEN", help="Ask the origin again: always, never, or an age like 10m.")
@click.option(
    "--require", type=click.Choice(["published", "signed"]), help="Refuse a model without such a manifest."
)
@click.option("--key", "keys", metavar="KEY", multiple=True, help="Trusted Ed25519 key: hex or a PEM file.")
@click.option("--workers", type=click.IntRange(0), help="Processes that stage; 0: by cores and size.")
@size_option("--chunk-size", "For models without a published manifest. [default: 16MiB]")
@click.option("--algorithm", type=click.Choice(["xxh3-128", "blake3"]), help="Chunk digests, likewise.")
@click.option("--connections", type=click.IntRange(1), help="At most so many requests at once, per worker.")
@click.option("--stream", is_flag=True, help="Stage no weights now: DST says where they come from.")
@agent_option
@shared
def command(
    call: Invocation, paths: tuple[str, ...], keys: tuple[str, ...], stream: bool, alone: bool, **options: Any
) -> None:
    """Stage model references, verified, onto local disk.

    With a DST the files also appear in that folder (reflink, else copy): SRC and DST in turn, as a
    KServe storage initializer gets them. With --stream the DST gets the small files only, and the
    loader of the program that opens it stages the weights while it loads them.

    Where the node's agent is there for this user, with the same store, it does the work.
    """
    from headrace.cache.progress import Progress
    from headrace.cache.staging import run
    from headrace.cli.display import displayed

    pairs = list(_pairs(paths))
    done: list[dict[str, Any]] = []
    lines: list[str] = []
    for source, destination in pairs:
        progress = Progress()
        request = _request(call, source, keys, **options)
        if stream:
            entry, line = _stream(call, request, progress, destination)
            done.append(entry)
            lines.append(line)
            continue
        with displayed(call, source, progress):
            report = run(staging_job(call, request, progress, alone=alone))
        entry = fields(report)
        if destination is not None:
            _deliver(call, report, destination)
            entry["destination"] = destination
        done.append(entry)
        lines.append(text(report, destination))
    call.emit({"snapshots": done}, "\n".join(lines))


def _pairs(paths: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    if len(paths) == 1:
        yield paths[0], None
        return
    if len(paths) % 2:
        raise UsageError(f"there are {len(paths)} arguments: give one SRC, or SRC and DST in turn.")
    yield from zip(paths[::2], paths[1::2], strict=True)


def _request(
    call: Invocation,
    source: str,
    keys: tuple[str, ...],
    *,
    include: tuple[str, ...],
    ignore: tuple[str, ...],
    revalidate: str | None,
    require: str | None,
    workers: int | None,
    chunk_size: int | None,
    algorithm: str | None,
    connections: int | None,
) -> StageRequest:
    from headrace.cache.config import max_age
    from headrace.cache.prepare import StageRequest
    from headrace.cache.snapshot import Selection

    if revalidate is not None:
        max_age(revalidate)
    request = StageRequest(
        source,
        call.root,
        call.domain,
        Selection(include, ignore),
        revalidate,
        require,
        keys,
        workers,
    )
    if chunk_size is not None:
        request = replace(request, chunk=chunk_size)
    if algorithm is not None:
        request = replace(request, algorithm=algorithm)
    if connections is not None:
        request = replace(request, limits=replace(request.limits, connections=connections))
    return request


def _stream(
    call: Invocation, request: StageRequest, progress: Progress, destination: str | None
) -> tuple[dict[str, Any], str]:
    """Make a stream directory. Returns the element of `snapshots`, and the same for people."""
    from headrace.cache.staging import StagingJob
    from headrace.cache.stream_directory import write_stream_directory
    from headrace.cli.display import displayed

    if destination is None:
        raise UsageError(f"--stream needs a DST: headrace stage --stream {request.reference} DIRECTORY")
    if request.selection.include or request.selection.ignore:
        raise UsageError("--stream takes the whole model: leave --include and --ignore out.")
    with displayed(call, request.reference, progress):
        job = StagingJob(request, progress)
        record, files = write_stream_directory(job, destination)
    entry = {
        "reference": request.reference,
        "snapshot": record.snapshot,
        "files": len(files),
        "bytes": progress.total,
        "stream": True,
        "destination": destination,
    }
    line = f"{request.reference}\n  snapshot {record.snapshot[:12]}\n  its small files are in {destination}"
    return entry, line


def _deliver(call: Invocation, report: StageReport, destination: str) -> None:
    from headrace.cache.deliver import deliver
    from headrace.cache.progress import Progress
    from headrace.cli.display import displayed
    from headrace.cli.verify import counting

    progress = Progress(total=report.bytes, phase="delivering")
    with call.store(writable=False) as store, displayed(call, destination, progress):
        snapshot = call.domain_of(store).snapshot(report.snapshot)
        deliver(snapshot, destination, progress=counting(progress))
        progress.phase = "delivered"


def fields(report: StageReport) -> dict[str, Any]:
    """One element of `snapshots` in `stage --json`."""
    return {
        "reference": report.reference,
        "snapshot": report.snapshot,
        "path": report.path,
        "files": report.files,
        "bytes": report.bytes,
        "chunks": report.chunks,
        "seconds": report.seconds,
        "sources": report.sources,
        "skipped": [asdict(skipped) for skipped in report.skipped],
        "notes": list(report.notes),
    }


def text(report: StageReport, destination: str | None) -> str:
    """The same for people."""
    fetched = ", ".join(f"{show_size(size)} from {name}" for name, size in report.sources.items() if size)
    lines = [
        report.reference,
        f"  {count(report.files, 'file')}, {show_size(report.bytes)}, in {show_seconds(report.seconds)}: "
        f"{fetched or 'it was staged already'}",
        f"  snapshot {report.snapshot[:12]}",
        f"  {report.path}",
    ]
    if destination is not None:
        lines.append(f"  delivered to {destination}")
    lines += [f"  skipped {s.path} ({show_size(s.size)}): {s.why}" for s in report.skipped]
    return "\n".join(lines)
