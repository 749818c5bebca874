"""`headrace`: finds the command, runs it, and turns what went wrong into a sentence and an exit code."""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from headrace.cache.errors import HeadraceError, Interrupted, UsageError
from headrace.cli import interrupts
from headrace.cli.invocation import to_stderr

# Command: the module that has it, as `command`. Modules are imported when their command is asked for.
COMMANDS = {
    "demo": "demo",
    "stage": "stage",
    "load": "load",
    "publish": "publish",
    "ls": "ls",
    "show": "show",
    "pin": "pin",
    "unpin": "unpin",
    "rm": "rm",
    "gc": "gc",
    "verify": "verify",
    "import": "import_folder",
    "export": "export",
    "agent": "agent",
    "status": "status",
    "explain": "explain",
    "bench": "bench",
    "simulate": "simulate",
    "completion": "completion",
}
BUG = 70
"""Exit code of an error that headrace did not expect."""
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code when whoever read standard output has gone."""

_EPILOG = "Exit codes: docs/exit-codes.md. Configuration: $HEADRACE_CONFIG, else /etc/headrace/config.toml."


class Commands(click.Group):
    """The commands, each imported only when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"headrace.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace", message="headrace %(version)s")
def commands() -> None:
    """Brings model weights to a node, verified, and into memory while they are still arriving."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    interrupts.install()
    if "_HEADRACE_COMPLETE" in os.environ:
        commands.main(args, prog_name="headrace")
    try:
        with commands.make_context("headrace", args) as context:
            commands.invoke(context)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as shown:
        shown.show()
        return shown.exit_code
    except click.ClickException as error:
        return _failed(UsageError(_sentence(error)), args)
    except (KeyboardInterrupt, click.Abort):
        return _failed(Interrupted("interrupted; what arrived is kept, and the next run resumes."), args)
    except HeadraceError as error:
        return _failed(error, args)
    except BrokenPipeError:
        if not _reader_gone(1):
            return _bug()
        # Python would complain once more when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return CLOSED_PIPE
    except Exception:  # noqa: BLE001  (the outermost frame: shown whole, as the bug that it is)
        return _bug()


def _failed(error: HeadraceError, args: Sequence[str]) -> int:
    to_stderr(f"headrace: {error}")
    if "--json" in args:
        kind = type(error).__name__
        wrong = {"kind": kind, "message": str(error), "exit_code": error.exit_code}
        print(json.dumps({"error": wrong}, ensure_ascii=False), flush=True)
    return error.exit_code


def _bug() -> int:
    traceback.print_exc()
    to_stderr("headrace: this is a bug in headrace: please report it with the lines above.")
    return BUG


def _sentence(error: click.ClickException) -> str:
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f" See `{error.ctx.command_path} --help`."
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}.{hint}"


def _reader_gone(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
