"""`headrace completion`: the script that teaches a shell to complete headrace's commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from headrace.cli.invocation import Invocation, shared


@click.command("completion", short_help="Print the shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@shared
def command(call: Invocation, shell: str) -> None:
    """Print the completion script; for bash: `source <(headrace completion bash)`."""
    from headrace.cli.main import commands

    found = get_completion_class(shell)
    assert found is not None, shell
    script = found(commands, {}, "headrace", "_HEADRACE_COMPLETE").source()
    call.emit({"shell": shell, "script": script}, script)
