"""Whether the node's agent does what a command asks for, or the command itself does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headrace.cli.invocation import Invocation

if TYPE_CHECKING:
    from headrace.cache.prepare import StageRequest
    from headrace.cache.progress import Progress
    from headrace.cache.staging import StagingJob


def agent_option(function: Callable[..., None]) -> Callable[..., None]:
    """The option --no-agent; arrives as `alone`."""
    return click.option("--no-agent", "alone", is_flag=True, help="Stage in this process, whoever is there.")(
        function
    )


def staging_job(call: Invocation, request: StageRequest, progress: Progress, *, alone: bool) -> StagingJob:
    """A job, not yet started: the agent's, if it is there for this user and has the same store; else our own.

    Raises:
        HeadraceError: what the agent refuses the request with.
    """
    from headrace.cache.staging import StagingJob
    from headrace.prefetch.client import AgentClient

    client = AgentClient()
    # First the cheap question: nothing is imported, nothing read, where there is no agent.
    if alone or request.options is not None or not client.there:
        return StagingJob(request, progress)
    from headrace.cache.errors import AgentError
    from headrace.cache.store import default_root
    from headrace.prefetch.client import Unsuited, same_store
    from headrace.prefetch.remote import RemoteJob

    settings = call.settings()
    root = Path(os.path.abspath(call.root or settings.root or default_root()))
    try:
        status = client.ask("GET", "/v1/agent")
        if not same_store(status, root):
            # Unless it was named: who has an agent mostly means the agent's store.
            if call.root is None:
                theirs = status.get("store", {}).get("root")
                call.say(f"the agent is not asked: its store is {theirs}, and here it is {root} (--root).")
            return StagingJob(request, progress)
        return RemoteJob(client, request, progress, settings, root)
    except Unsuited as why:
        call.say(f"the agent is not asked: {why}.")
    except AgentError as error:
        call.say(f"staging without the agent: {error}")
    return StagingJob(request, progress)
