"""`headrace publish`: upload a model with the manifest that describes it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from headrace.cli.invocation import Invocation, shared, size_option
from headrace.cli.units import count, show_seconds, show_size


@click.command("publish", short_help="Upload a folder with its manifest.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.argument("uri", metavar="URI")
@click.option("--sign", metavar="KEY", type=click.Path(), help="PEM file with an Ed25519 private key.")
@size_option("--chunk-size", "The largest chunk. [default: 16MiB]")
@click.option(
    "--algorithm",
    type=click.Choice(["xxh3-128", "blake3"]),
    default="xxh3-128",
    show_default=True,
    help="Chunk digests; blake3 where nodes or tenants do not trust each other.",
)
@click.option(
    "--predecessor",
    default="auto",
    show_default=True,
    metavar="DIGEST",
    help="Manifest of the revision before: auto (what is at URI now), none, or its digest.",
)
@click.option("--include", metavar="GLOB", multiple=True, help="Only files that fit; repeatable.")
@click.option("--ignore", metavar="GLOB", multiple=True, help="No files that fit; repeatable.")
@shared
def command(
    call: Invocation,
    folder: str,
    uri: str,
    sign: str | None,
    chunk_size: int | None,
    algorithm: str,
    predecessor: str,
    include: tuple[str, ...],
    ignore: tuple[str, ...],
) -> None:
    """Upload DIR to URI with a manifest, so that every node can verify from the first byte.

    Use a new URI for each revision: nodes find unchanged chunks again by their digests.
    """
    from headrace.cache.grid import DEFAULT_CHUNK
    from headrace.cache.progress import Progress
    from headrace.cache.publish import publish
    from headrace.cli.display import displayed

    progress = Progress()
    with displayed(call, uri, progress):
        report = publish(
            folder,
            uri,
            chunk=chunk_size or DEFAULT_CHUNK,
            algorithm=algorithm,
            sign=Path(sign) if sign else None,
            predecessor=None if predecessor == "none" else predecessor,
            include=include,
            ignore=ignore,
            progress=progress,
        )
    lines = [
        report.uri,
        f"  {count(report.files, 'file')}, {show_size(report.bytes)}, "
        f"{show_size(report.uploaded)} uploaded in {show_seconds(report.seconds)}",
        f"  manifest {report.digest}",
    ]
    if report.predecessor:
        lines.append(f"  follows {report.predecessor}")
    if report.key:
        lines.append(f"  signed by {report.key}")
    lines += [f"  skipped {s.path} ({show_size(s.size)}): {s.why}" for s in report.skipped]
    lines += [f"  there too, and no part of it: {path}" for path in report.leftover]
    call.emit(asdict(report), "\n".join(lines))
