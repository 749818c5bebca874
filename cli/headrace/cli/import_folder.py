"""`headrace import`: adopt a local folder or Hugging Face cache into the store."""

from __future__ import annotations

import click

from headrace.cli.invocation import Invocation, shared


@click.command("import", short_help="Adopt a local folder or Hugging Face cache.")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--as", "name", metavar="REFERENCE", help="What it is to be remembered as.")
@click.option("--include", metavar="GLOB", multiple=True, help="Only files that fit; repeatable.")
@click.option("--ignore", metavar="GLOB", multiple=True, help="No files that fit; repeatable.")
@shared
def command(
    call: Invocation, folder: str, name: str | None, include: tuple[str, ...], ignore: tuple[str, ...]
) -> None:
    """Stage a folder of this machine, or a model of a Hugging Face cache, under a name.

    A cache's `models--org--name` folder becomes hf://org/name (and hf://org/name@revision): with
    `--revalidate never` it is then staged without asking the hub.
    """
    from headrace.cache.importing import import_folder
    from headrace.cache.progress import Progress
    from headrace.cli.display import displayed
    from headrace.cli.stage import fields, text

    progress = Progress()
    with displayed(call, folder, progress):
        report = import_folder(
            folder,
            root=call.root,
            domain=call.domain,
            name=name,
            include=include,
            ignore=ignore,
            progress=progress,
        )
    call.emit({"snapshots": [fields(report)]}, text(report, None))
