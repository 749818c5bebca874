"""`headrace status`: what the node's agent is doing."""

from __future__ import annotations

import time
from typing import Any

import click

from headrace.cli.invocation import Invocation, shared
from headrace.cli.units import count, show_age, show_seconds, show_size


@click.command("status", short_help="What the node's agent is doing.")
@click.option("--socket", metavar="PATH", help="The agent's. [default: $HEADRACE_SOCKET, else the node's]")
@shared
def command(call: Invocation, socket: str | None) -> None:
    """Show the agent's jobs with their rates and sources, its peers and tracker, and its store.

    (--root and --domain do not count here.)
    """
    from headrace.prefetch.client import AgentClient

    status = AgentClient(socket).ask("GET", "/v1/status")
    call.emit(status, _text(status))


def _text(status: dict[str, Any]) -> str:
    store, node = status["store"], status["node"]
    zone = f", zone {node['zone']}" if node["zone"] else ""
    lines = [
        f"agent {status['version']} on {node['name']}{zone}: {status['phase']}, process {status['pid']}, "
        f"started {show_age(time.time() - status['started'])}",
        f"  store {store['root']}: {show_size(store['used'])} used, {show_size(store['free'])} free",
        f"  {_cluster(status['cluster'])}",
    ]
    if status["volumes"]:
        lines.append(f"  {count(len(status['volumes']), 'volume')}")
    jobs = status["jobs"]
    lines += [line for job in jobs[:20] for line in _job(job)] or ["  no jobs"]
    return "\n".join(lines)


def _cluster(cluster: dict[str, Any]) -> str:
    if not cluster["enabled"]:
        return "no cluster: it stages from origins alone"
    uploads = cluster["uploads"]
    sent = sum(uploads["sent"].values())
    tracker = cluster.get("tracker") or "none"
    return (
        f"{count(len(cluster['members']), 'other node')}, tracker {tracker}"
        f"{' (not reachable)' if cluster['degraded'] else ''}, {show_size(sent)} given to others"
    )


def _job(job: dict[str, Any]) -> list[str]:
    progress = job["progress"]
    fetched = {source: size for source, size in progress["fetched"].items() if size}
    moved = sum(fetched.values())
    done = min(progress["total"], progress["present"] + moved)
    sources = ", ".join(f"{show_size(size)} from {source}" for source, size in fetched.items())
    line = f"  {job['job']} {job['reference']} ({job['class']}): {job['state']}"
    if job["state"] == "running" and progress["total"]:
        rate = moved / progress["seconds"] if progress["seconds"] else 0.0
        line += f", {done / progress['total']:.0%} of {show_size(progress['total'])}, {show_size(rate)}/s"
    elif job["state"] == "staged":
        line += f", {show_size(progress['total'])} in {show_seconds(job['report']['seconds'])}"
    lines = [line + (f", {sources}" if sources else "")]
    if "error" in job:
        lines.append(f"    {job['error']['message']}")
    return lines
