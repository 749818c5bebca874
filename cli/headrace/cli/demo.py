"""`headrace demo`: the main job from end to end, on an object store of its own."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headrace.cache.errors import MissingDependency, NoSpace
from headrace.cli.invocation import Invocation, shared, size_option
from headrace.cli.table import aligned
from headrace.cli.units import show_seconds, show_size

if TYPE_CHECKING:
    from headrace.cli.demo_runs import Run

_FULL, _SMOKE = 2_000_000_000, 128_000_000
# On disk at once: the model, the object store's copy, and two more (a download, stores).
_COPIES = 4
_LIBRARIES = ("torch", "safetensors", "boto3", "obstore")


@click.command("demo", short_help="The main job on an embedded object store.")
@size_option("--size", "Of the synthetic model. [default: 2GB]")
@click.option("--smoke", is_flag=True, help="A small synthetic model: seconds instead of a minute.")
@click.option("--temp", metavar="DIR", type=click.Path(), help="Where the temporary folder is made.")
@shared
def command(call: Invocation, size: int | None, smoke: bool, temp: str | None) -> None:
    """Publish a real and a synthetic model to an embedded object store, stage and load them, compare.

    Everything happens on loopback and in a temporary folder; nothing stays. (--root and --domain do
    not count here.)
    """
    begun = time.monotonic()
    size = size or (_SMOKE if smoke else _FULL)
    _check_libraries()
    with tempfile.TemporaryDirectory(prefix="headrace-demo-", dir=temp) as name:
        _check_space(Path(name), size)
        runs = list(_runs(call, Path(name), size))
    seconds = time.monotonic() - begun
    text = f"{_table(runs)}\n\n{_where(runs)}\n\n{_summary(runs)} All of it took {show_seconds(seconds)}."
    call.emit({"seconds": seconds, "runs": [asdict(run) for run in runs]}, text)


def _runs(call: Invocation, folder: Path, size: int) -> Iterator[Run]:
    from headrace.cache.publish import publish
    from headrace.cli import demo_models, demo_runs, demo_server

    real = demo_models.real_model()
    call.say("starting an object store (SeaweedFS)")
    with demo_server.running(folder / "server") as server, demo_server.environment(server):
        call.say(f"making a synthetic model of {show_size(size)}")
        synthetic = demo_models.make_synthetic(folder / "synthetic", size)
        models = {demo_models.REAL_NAME: real, "synthetic": synthetic}
        for model, source in models.items():
            report = publish(source, f"s3://{demo_server.BUCKET}/{model}")
            call.say(f"published {model}: {show_size(report.bytes)} in {show_seconds(report.seconds)}")
        for model, source in models.items():
            call.say(f"{model}: download, then load")
            yield demo_runs.plain(model, source, server, folder / "plain")
            shutil.rmtree(folder / "plain")
            for run in (demo_runs.cold, demo_runs.warm):
                call.say(f"{model}: headrace, {run.__name__}")
                yield run(model, source, folder / "store")
            shutil.rmtree(folder / "store")
            if source is synthetic:
                call.say(f"{model}: headrace, killed midway and resumed")
                yield demo_runs.resumed(model, source, folder / "store")
                shutil.rmtree(folder / "store")


def _table(runs: list[Run]) -> str:
    header = ("MODEL", "", "SECONDS", "GB/s", "FROM ORIGIN", "TENSORS EQUAL", "")
    rows = [
        (
            run.model,
            run.kind,
            f"{run.seconds:.2f}",
            f"{run.bytes / 1e9 / run.seconds:.2f}",
            show_size(run.origin),
            f"{run.compared}",
            run.note,
        )
        for run in runs
    ]
    return aligned([header, *rows], right=(2, 3, 4, 5))


def _where(runs: list[Run]) -> str:
    lines = ["where the time went (of several threads: summed):"]
    for run in runs:
        times = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in run.times.items())
        lines.append(f"  {run.model}, {run.kind}: {times or 'nowhere for long'}")
    return "\n".join(lines)


def _summary(runs: list[Run]) -> str:
    equal = sum(run.compared for run in runs)
    return f"{equal:,} tensors were compared bit for bit with what safetensors reads, and are equal."


def _check_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"the demo needs libraries that are not installed ({', '.join(missing)}): pip install 'headrace[demo]'."
        )


def _check_space(folder: Path, size: int) -> None:
    needed = _COPIES * (size + 100_000_000)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the demo needs {show_size(needed)} in {str(folder.parent)!r}, where {show_size(free)} are free: "
            "choose another folder with --temp, or a smaller model with --size.",
            needed - free,
        )
