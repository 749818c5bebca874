"""`headrace load`: a model's tensors into memory, staged as far as needed."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import click

from headrace.cli.invocation import Invocation, shared
from headrace.cli.through_agent import agent_option
from headrace.cli.units import count, show_seconds, show_size

if TYPE_CHECKING:
    from headrace.loader import LoadStats


@click.command("load", short_help="Load tensors while they are still arriving.")
@click.argument("source", metavar="SRC_OR_DIR")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu or cuda:N.")
@click.option("--name", "names", metavar="TENSOR", multiple=True, help="Only this tensor; repeatable.")
@click.option(
    "--pattern", "patterns", metavar="GLOB", multiple=True, help="Only tensors that fit; repeatable."
)
@click.option(
    "--read-path",
    type=click.Choice(["auto", "mapped", "buffered", "direct"]),
    default="auto",
    show_default=True,
    help="How files are read.",
)
@click.option(
    "--verify",
    type=click.Choice(["auto", "always", "boot", "never"]),
    default="auto",
    show_default=True,
    help="Compare what is read with its digests: always; if it was not since the machine started (boot); never; "
    "or if it never was (auto).",
)
@click.option("--rank", type=int, metavar="R", help="Load only what rank R of --world needs.")
@click.option("--world", type=int, metavar="N", help="Of how many ranks --rank is one.")
@click.option(
    "--tp-plan",
    metavar="FILE|auto",
    help="How ranks share tensors: a JSON object of names and styles, as transformers has them; or transformers' own.",
)
@click.option("--explain", is_flag=True, help="Say which read path was taken for each file, and why.")
@click.option("--digest", is_flag=True, help="Compute the digest over all loaded tensors.")
@agent_option
@shared
def command(
    call: Invocation,
    source: str,
    device: str,
    names: tuple[str, ...],
    patterns: tuple[str, ...],
    read_path: str,
    verify: str,
    rank: int | None,
    world: int | None,
    tp_plan: str | None,
    explain: bool,
    digest: bool,
    alone: bool,
) -> None:
    """Load safetensors from a model reference, a folder or a file; bytes are read as they arrive."""
    from headrace.cache.prepare import StageRequest
    from headrace.cache.progress import Progress
    from headrace.cli.display import displayed
    from headrace.cli.loading import load_model, share_of
    from headrace.cli.through_agent import staging_job

    progress = Progress()
    # A folder or file is read where it is: nothing is staged, so there is nothing to watch.
    shown = contextlib.nullcontext() if os.path.exists(source) else displayed(call, source, progress)
    with shown:
        outcome = load_model(
            source,
            root=call.root,
            domain=call.domain,
            progress=progress,
            device=device,
            names=names,
            patterns=patterns,
            read_path=read_path,
            verify=verify,
            share=share_of(rank, world, tp_plan),
            begin=lambda: staging_job(
                call, StageRequest(source, call.root, call.domain), progress, alone=alone
            ),
        )
    result: dict[str, Any] = outcome.stats.as_json()
    if digest:
        result["digest"] = outcome.loaded.digest()
    call.emit(result, _text(outcome.stats, result.get("digest"), explain))


def _text(stats: LoadStats, digest: str | None, explain: bool) -> str:
    speed = f"{stats.gigabytes_per_second:.2f} GB/s" if stats.seconds else "at once"
    lines = [
        stats.source,
        f"  {count(stats.tensors, 'tensor')}, {show_size(stats.bytes)}, "
        f"in {show_seconds(stats.seconds)} ({speed}), {stats.read_path}",
        f"  {', '.join(f'{span.name} {show_seconds(span.seconds)}' for span in stats.trace)}",
    ]
    if stats.snapshot is not None:
        lines.append(f"  snapshot {stats.snapshot[:12]}")
    if digest is not None:
        lines.append(f"  digest {digest}")
    if explain:
        lines += [f"  {sentence}" for sentence in stats.explain]
    return "\n".join(lines)
