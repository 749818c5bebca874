"""The administrator's socket: everything the agent can be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from aiohttp import web

from headrace.cache import evict
from headrace.cache.bandwidth import Class
from headrace.cache.errors import HeadraceError, NotFound, NotStaged, UsageError
from headrace.cache.inventory import entry
from headrace.cache.reference import parse
from headrace.cache.snapshot import Snapshot
from headrace.cache.store import Domain
from headrace.cache.verify import verify
from headrace.prefetch import explain, messages
from headrace.prefetch.answers import Lines, application, body, follow, text_of
from headrace.prefetch.jobs import Job, Watcher

if TYPE_CHECKING:
    from headrace.prefetch.agent import Agent

DIFFERS = 409
"""HTTP status of a request that means something else here than for who asks."""

T = TypeVar("T")


def build(agent: Agent) -> web.Application:
    """The application of the administrator's socket."""
    this = _Administration(agent)
    return application(
        [
            web.get("/v1/agent", this.identity),
            web.get("/v1/status", this.status),
            web.post("/v1/stage", this.stage),
            web.get("/v1/jobs", this.jobs),
            web.get("/v1/jobs/{job}", this.job),
            web.get("/v1/jobs/{job}/progress", this.progress),
            web.delete("/v1/jobs/{job}", this.cancel),
            web.get("/v1/snapshots", this.snapshots),
            web.get("/v1/snapshot", this.snapshot),
            web.post("/v1/pin", this.pin),
            web.post("/v1/unpin", this.unpin),
            web.post("/v1/remove", this.remove),
            web.post("/v1/verify", this.verify),
            web.get("/v1/explain", this.explain),
            web.post("/v1/reload", this.reload),
            web.get("/v1/volumes", this.volumes),
            web.post("/v1/volumes", this.add_volume),
            web.delete("/v1/volumes/{volume}", this.remove_volume),
            *health(agent),
        ],
        lambda request: UsageError(f"the agent has no {request.method} {request.path}: see docs/agent.md."),
    )


def health(agent: Agent) -> list[web.RouteDef]:
    """`/healthz`: it lives. `/readyz`: it takes work."""

    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if agent.ready else web.Response(text=f"{agent.phase}\n", status=503)

    return [web.get("/healthz", alive), web.get("/readyz", ready)]


class _Administration:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def identity(self, _: web.Request) -> web.Response:
        return web.json_response(self._agent.identity())

    async def status(self, _: web.Request) -> web.Response:
        return web.json_response(await self._agent.status())

    # -- staging

    async def stage(self, request: web.Request) -> web.StreamResponse:
        asked = await body(request)
        of: Class = asked.get("class", "demand")
        if of not in get_args(Class):
            raise UsageError(f"the class of a job is demand or prestage, not {of!r}.")
        agent = self._agent
        wanted = messages.request_from_json(asked.get("request"), str(agent.settings.root))
        reference = parse(wanted.reference)
        if (theirs := asked.get("origin")) is not None:
            ours = agent.settings.config.options(reference)
            if differing := [
                name
                for name in messages.SAME_ORIGIN
                if name in theirs and theirs[name] != getattr(ours, name)
            ]:
                return web.json_response(
                    {"differs": f"its {differing[0]} for {reference.scheme}:// is another one"},
                    status=DIFFERS,
                )
        waits = bool(asked.get("wait", True))
        watcher = Watcher(of, waits=waits)
        job = agent.jobs.ask(wanted, watcher)
        if not waits:
            return web.json_response(job.as_json(), status=202)
        try:
            return await follow(request, job, watcher)
        finally:
            # Also when the client has gone: then this handler is cancelled.
            agent.jobs.leave(job, watcher)

    async def jobs(self, _: web.Request) -> web.Response:
        return web.json_response({"jobs": [job.as_json() for job in self._agent.jobs.all()]})

    async def job(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request).as_json())

    async def progress(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        watcher = Watcher("prestage")
        self._agent.jobs.watch(job, watcher)
        try:
            return await follow(request, job, watcher)
        finally:
            self._agent.jobs.leave(job, watcher)

    async def cancel(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self._agent.jobs.cancel(job)
        if job.task is not None:
            await asyncio.wait([job.task])
        return web.json_response(job.as_json())

    def _job(self, request: web.Request) -> Job:
        job = self._agent.jobs.find(request.match_info["job"])
        if job is None:
            raise NotFound(f"there is no job {request.match_info['job']!r}: `headrace status` lists them.")
        return job

    # -- the store

    async def snapshots(self, request: web.Request) -> web.Response:
        domain = self._domain(request.query.get("domain"))

        def listed() -> list[dict[str, Any]]:
            found = []
            for snapshot in domain.snapshots():
                try:
                    found.append(entry(domain, snapshot).as_json())
                except NotStaged:
                    continue  # evicted between the two looks
            return sorted(found, key=lambda one: -one["last_used"])

        return web.json_response({"root": str(self._agent.store.root), "snapshots": await _thread(listed)})

    async def snapshot(self, request: web.Request) -> web.Response:
        domain, name = self._domain(request.query.get("domain")), request.query.get("name", "")
        return web.json_response(await _thread(lambda: entry(domain, find(domain, name)).as_json()))

    async def pin(self, request: web.Request) -> web.Response:
        asked = await body(request)
        reason = asked.get("reason", "")
        if not isinstance(reason, str):
            raise UsageError("the reason of a pin has to be a text.")
        snapshot = await self._found(asked)
        await _thread(lambda: evict.pin(snapshot, reason))
        return web.json_response({"snapshot": snapshot.id, "pinned": reason})

    async def unpin(self, request: web.Request) -> web.Response:
        snapshot = await self._found(await body(request))
        await _thread(lambda: evict.unpin(snapshot))
        return web.json_response({"snapshot": snapshot.id, "pinned": None})

    async def remove(self, request: web.Request) -> web.Response:
        asked = await body(request)
        domain, store = self._domain(asked.get("domain")), self._agent.store
        snapshot = await self._found(asked)
        force = asked.get("force", False) is True
        removed = await _thread(lambda: evict.remove(store, domain, snapshot, force=force))
        self._agent.removed(domain.name, snapshot.id)
        return web.json_response({"removed": asdict(removed)})

    async def verify(self, request: web.Request) -> web.StreamResponse:
        asked = await body(request)
        domain, store = self._domain(asked.get("domain")), self._agent.store
        snapshot = await self._found(asked)
        read = 0

        def count(size: int) -> None:
            nonlocal read
            read += size

        lines = Lines(request)
        work = asyncio.ensure_future(_thread(lambda: verify(store, domain, snapshot, progress=count)))
        answer = await lines.begin()
        while not (await asyncio.wait([work], timeout=0.5))[0]:
            await lines.say(read=read)
        try:
            report = work.result()
            await lines.say(report={**asdict(report), "ok": report.ok})
        except HeadraceError as error:
            await lines.say(**messages.error_to_json(error))
        await answer.write_eof()
        return answer

    async def explain(self, request: web.Request) -> web.Response:
        domain = self._domain(request.query.get("domain"))
        return web.json_response(await explain.explain(self._agent, domain, request.query.get("name", "")))

    def _domain(self, name: Any) -> Domain:
        if name is not None and not isinstance(name, str):
            raise UsageError("a trust domain has to be a text.")
        return self._agent.store.domain(name or self._agent.settings.config.domain)

    async def _found(self, asked: dict[str, Any]) -> Snapshot:
        domain, name = self._domain(asked.get("domain")), text_of(asked, "name")
        return await _thread(lambda: find(domain, name))

    # -- the agent itself

    async def reload(self, _: web.Request) -> web.Response:
        await self._agent.reload()
        return web.json_response({"reloaded": self._agent.settings.where})

    async def volumes(self, _: web.Request) -> web.Response:
        return web.json_response({"volumes": [one.as_json() for one in self._agent.volumes.all()]})

    async def add_volume(self, request: web.Request) -> web.Response:
        asked = await body(request)
        domain = self._domain(asked.get("domain"))
        names = asked.get("snapshots", ())
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise UsageError("a volume needs its snapshots, a list of texts.")
        ids = [snapshot.id for snapshot in await _thread(lambda: [find(domain, name) for name in names])]
        volume = await self._agent.volumes.add(text_of(asked, "volume"), domain.name, ids)
        return web.json_response(volume.as_json(), status=201)

    async def remove_volume(self, request: web.Request) -> web.Response:
        await self._agent.volumes.remove(request.match_info["volume"])
        return web.json_response({"removed": request.match_info["volume"]})


def find(domain: Domain, name: str) -> Snapshot:
    """A snapshot by its id, the start of it, or a reference as a user types it. Raises NotStaged."""
    try:
        return domain.find(name)
    except NotStaged:
        try:
            return domain.find(str(parse(name)))
        except (NotStaged, UsageError):
            pass
        raise


async def _thread(work: Callable[[], T]) -> T:
    """The disk may be slow; nobody else waits for it."""
    return await asyncio.to_thread(work)
