"""`headrace agent`: the node's daemon."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import click

from headrace.cache.errors import MissingDependency
from headrace.cli.invocation import Invocation, shared


@click.command("agent", short_help="The node's daemon.")
@click.option(
    "--config", "path", metavar="FILE", help="Its settings. [default: $HEADRACE_CONFIG, else the node's]"
)
@click.option("--check", is_flag=True, help="Only read the settings, and say what is in effect.")
@shared
def command(call: Invocation, path: str | None, check: bool) -> None:
    """Stage, pin and verify for others on this node, and exchange models with other nodes.

    Runs until SIGTERM or Ctrl-C; SIGHUP reads the settings again. See docs/agent.md.
    """
    from headrace.prefetch import settings

    environ = _environment(call)
    chosen = settings.load(path, environ)
    if check:
        settings.check_files(chosen)
        found = settings.effective(chosen)
        call.emit({"settings": chosen.where, **found}, _as_text(found))
        return
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, force=True
    )
    logging.getLogger("headrace").setLevel(chosen.log_level.upper())
    try:
        from headrace.prefetch.agent import Agent
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the agent needs {error.name}, which is not installed: pip install 'headrace[agent]'."
        ) from None
    import asyncio

    asyncio.run(Agent(chosen, lambda: settings.load(path, environ)).run())


def _environment(call: Invocation) -> dict[str, str]:
    """The environment, with what the options say laid over it: an option counts most."""
    environ = dict(os.environ)
    if call.root is not None:
        environ["HEADRACE_ROOT"] = call.root
    return environ


def _as_text(found: dict[str, Any]) -> str:
    """Settings as TOML."""
    plain = {key: value for key, value in found.items() if not isinstance(value, dict) and key != "origins"}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    lines += [f"# rules for origins below {prefix}" for prefix in found["origins"]]
    for section, values in found.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(name)} = {_value(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)
