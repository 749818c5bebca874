"""`headrace explain`: why a model is where it is on this node."""

from __future__ import annotations

import click

from headrace.cli.invocation import Invocation, shared, stored_names


@click.command("explain", short_help="Why a model is where it is on this node.")
@click.argument("model", metavar="SNAPSHOT_OR_REFERENCE", shell_complete=stored_names)
@click.option("--socket", metavar="PATH", help="The agent's. [default: $HEADRACE_SOCKET, else the node's]")
@shared
def command(call: Invocation, model: str, socket: str | None) -> None:
    """Ask the node's agent what there is of a model, who brings it, from where, and what keeps it.

    (--root does not count here: the store is the agent's.)
    """
    from headrace.prefetch.client import AgentClient

    found = AgentClient(socket).ask("GET", "/v1/explain", name=model, domain=call.domain)
    call.emit(found, "\n".join([model, *(f"  {sentence}" for sentence in found["why"])]))
