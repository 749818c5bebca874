"""Why a model is where it is on this node: what there is of it, who brings it, from where, and who else is asked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from headrace.cache import evict
from headrace.cache.errors import NotStaged, UsageError
from headrace.cache.inventory import entry
from headrace.cache.reference import parse
from headrace.cache.store import Domain

if TYPE_CHECKING:
    from headrace.prefetch.agent import Agent
    from headrace.prefetch.jobs import Job


async def explain(agent: Agent, domain: Domain, name: str) -> dict[str, Any]:
    """Facts and sentences about one snapshot or reference.

    Raises:
        UsageError: no name was given.
        NotStaged: neither the store nor a job knows it.
    """
    if not name:
        raise UsageError("explain needs a name: a snapshot or a reference.")
    jobs = [job for job in agent.jobs.all() if _means(job, name)]
    stored = await asyncio.to_thread(_stored, agent, domain, name)
    if stored is None and not jobs:
        raise NotStaged(f"{name!r} is not in the store, and nobody has asked the agent for it.")
    cluster = agent.cluster.status()
    return {
        "snapshot": stored,
        "jobs": [job.as_json() for job in jobs],
        "cluster": cluster,
        "why": [
            *_about_store(stored),
            *(s for job in jobs[:1] for s in _about_job(job)),
            *_about_cluster(cluster),
        ],
    }


def _means(job: Job, name: str) -> bool:
    if job.opened is not None and len(name) >= 4 and job.opened[1].startswith(name):
        return True
    try:
        return str(parse(name)) == str(parse(job.request.reference))
    except UsageError:
        return False


def _stored(agent: Agent, domain: Domain, name: str) -> dict[str, Any] | None:
    try:
        snapshot = domain.find(name)
    except NotStaged:
        try:
            snapshot = domain.find(str(parse(name)))
        except (NotStaged, UsageError):
            return None
    found = entry(domain, snapshot).as_json()
    return {**found, "held": evict.held_by(agent.store, domain, snapshot)}


def _about_store(stored: dict[str, Any] | None) -> list[str]:
    if stored is None:
        return ["nothing of it is in this node's store"]
    if stored["staged"]:
        said = ["all of it is in this node's store, verified"]
    else:
        said = [f"{stored['present']} of {stored['bytes']} bytes are in this node's store"]
    said.append(
        f"it cannot be evicted: {stored['held']}" if stored["held"] else "nothing keeps it from eviction"
    )
    if not stored["published"]:
        said.append(
            "it has no published manifest: a new revision is fetched whole where no digests are known"
        )
    return said


def _about_job(job: Job) -> list[str]:
    fetched = {source: size for source, size in job.progress.fetched.items() if size}
    where = ", ".join(f"{size} bytes from {source}" for source, size in fetched.items()) or "nothing yet"
    if job.state == "waiting":
        return ["its pre-staging waits for others to end ([agent] prestage_jobs)"]
    if job.state == "running":
        return [f"it is being staged ({job.of}): {where}"]
    said = [f"the last job {job.state}: {where}"]
    if job.error is not None:
        said.append(str(job.error).rstrip("."))
    return said


def _about_cluster(cluster: dict[str, Any]) -> list[str]:
    if not cluster.get("enabled"):
        return ["no other node is asked: [peers] says nowhere to listen"]
    known = len(cluster.get("members", ()))
    said = ["1 other node is known" if known == 1 else f"{known} other nodes are known"]
    if cluster.get("degraded"):
        said.append(
            "the tracker cannot be reached: nodes ask each other, and each chunk has an owner who reads it"
        )
    return said
