"""`headrace bench`: runs one of the benchmarks of a source checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from headrace.cache.errors import UsageError
from headrace.cli.invocation import Invocation, shared

# What makes a module of `benchmarks/` a benchmark rather than a part of one.
_SIGNS = ('if __name__ == "__main__":', '"--smoke"')


class BenchmarkFailed(click.exceptions.Exit):
    """A benchmark ended with an exit code of its own, which becomes ours."""


@click.command(
    "bench",
    short_help="Run a benchmark of the source checkout.",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
@click.argument("name", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--names", is_flag=True, help="Only print the names.")
@shared
def command(call: Invocation, name: str | None, arguments: tuple[str, ...], names: bool) -> None:
    """Run a benchmark of the source checkout; what follows NAME goes to it. Without NAME: list them."""
    folder = benchmarks()
    found = {
        path.stem: path.read_text()
        for path in sorted(folder.glob("*.py"))
        if all(sign in path.read_text() for sign in _SIGNS)
    }
    if name is None:
        purposes = {stem: _purpose(text) for stem, text in found.items()}
        lines = list(purposes) if names else [f"{stem:12} {text}" for stem, text in purposes.items()]
        call.emit({"benchmarks": purposes}, "\n".join(lines))
        return
    if name not in found:
        raise UsageError(f"there is no benchmark {name!r}: choose from {', '.join(found) or 'none'}.")
    raise BenchmarkFailed(run(folder / f"{name}.py", arguments))


def benchmarks() -> Path:
    """`benchmarks/` of the checkout that this module lies in, or of the current folder.

    Raises:
        UsageError: neither is a checkout: benchmarks are not part of an installed headrace.
    """
    for checkout in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (checkout / "benchmarks").is_dir() and (checkout / "cache" / "headrace").is_dir():
            return checkout / "benchmarks"
    raise UsageError(
        "benchmarks are part of the source, not of an installed headrace: run this in a checkout of it."
    )


def _purpose(text: str) -> str:
    import ast

    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def run(script: Path, arguments: tuple[str, ...]) -> int:
    """Run a program of the checkout with this Python; its exit code."""
    # Benchmarks share the tests' servers.
    paths = [str(script.parents[1] / "tests"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=env)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
