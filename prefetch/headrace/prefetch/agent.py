"""The node's agent: puts its parts together, starts them in order, and ends them in the opposite one.

The main process answers on sockets, serves other nodes and watches over staging processes; it stages
nothing itself, so that it stays small and idle while nothing is asked of it.

Crash story. The agent keeps no state of its own. After `kill -9` its staging processes notice that their
input has ended, and end; locks and claims are the kernel's and end with them; the next agent finds
everything in the store, and the volumes' sockets by their records.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from headrace.cache import disk, evict
from headrace.cache.errors import HeadraceError
from headrace.cache.store import Store
from headrace.prefetch import administration, lifecycle, settings, sockets
from headrace.prefetch.answers import VERSION, application
from headrace.prefetch.jobs import Job, JobTable
from headrace.prefetch.lifecycle import StoreLock
from headrace.prefetch.membership import Membership
from headrace.prefetch.metrics import Metrics
from headrace.prefetch.settings import AgentSettings
from headrace.prefetch.volumes import Volumes

_USAGE_AGE = 30.0  # seconds for which the store's size is believed; finding it out looks at every file
_CLOSING = 2.0

log = logging.getLogger(__name__)


class Agent:
    """One agent; `run` it once.

    Attributes:
        phase: "starting", "ready", "reloading" or "stopping".
    """

    def __init__(self, chosen: AgentSettings, again: Callable[[], AgentSettings]) -> None:
        """
        Args:
            again: reads the settings once more, for a reload. Raises HeadraceError.
        """
        self.settings = chosen
        self.phase = "starting"
        self.started = time.time()
        self._again = again
        self._stop = asyncio.Event()
        self._runners: list[web.AppRunner] = []
        self._usage = (0.0, 0)
        self.store: Store
        self.jobs: JobTable
        self.volumes: Volumes
        self.cluster: Membership
        self.metrics: Metrics

    @property
    def ready(self) -> bool:
        return self.phase in ("ready", "reloading")

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises:
            HeadraceError: it cannot start: the store, a socket, a secret.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload)
        async with contextlib.AsyncExitStack() as parts:
            await self._start(parts)
            self.phase = "ready"
            lifecycle.notify("READY=1", "STATUS=ready")
            log.info("ready: store %s, socket %s", self.settings.root, self.settings.socket)
            await self._stop.wait()
            self.phase = "stopping"
            lifecycle.notify("STOPPING=1", "STATUS=stopping")
            log.info("stopping")

    async def _start(self, parts: contextlib.AsyncExitStack) -> None:
        """Each part that starts leaves in `parts` how it ends; they end in the opposite order."""
        chosen = self.settings
        self.store = Store.open(chosen.root)
        parts.callback(self.store.close)
        lock = await StoreLock.take(chosen.root, chosen.lock_wait)
        parts.callback(lock.release)
        self.cluster = Membership(chosen, self.store)
        await self.cluster.start()
        parts.push_async_callback(self.cluster.stop)
        self.jobs = JobTable(chosen, cluster=self.cluster.for_processes, ended=self._job_ended)
        self.metrics = Metrics(self)
        self.volumes = Volumes(chosen.volumes, self.store)
        parts.push_async_callback(self.volumes.close)
        await self.volumes.reopen()
        if chosen.metrics:
            await self._serve_metrics(chosen.metrics, parts)
        # Last: whoever finds it finds everything else as well.
        await self._serve(administration.build(self), sockets.listen(chosen.socket, 0o600), parts)
        made = sockets.inode(chosen.socket)
        parts.callback(lambda: sockets.unlink(chosen.socket, made))
        # First of all that ends: those who wait for jobs hear of it while the sockets still stand.
        parts.push_async_callback(self.jobs.close)

    async def _serve(self, app: web.Application, listener: Any, parts: contextlib.AsyncExitStack) -> None:
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_CLOSING)
        await runner.setup()
        parts.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()

    async def _serve_metrics(self, address: str, parts: contextlib.AsyncExitStack) -> None:
        handlers = [web.get("/metrics", self.metrics.answer), *administration.health(self)]
        app = application(handlers, lambda request: HeadraceError("there is /metrics, /healthz and /readyz."))
        await self._serve(app, sockets.listen_tcp(address, "the metrics address"), parts)

    # -- signals

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():
            log.warning("asked to stop for the second time: ending at once")
            # Claims are kernel locks, and what is marked is right.
            os._exit(0)
        self._stop.set()

    def _asked_to_reload(self) -> None:
        async def attempt() -> None:
            with contextlib.suppress(HeadraceError):
                await self.reload()

        self._reloading = asyncio.create_task(attempt())

    async def reload(self) -> None:
        """Read settings, secrets and rates again; nothing that runs is cut off.

        Raises:
            HeadraceError: they are wrong: the old ones stay in force.
        """
        lifecycle.notify_reloading()
        self.phase = "reloading"
        try:
            fresh = await asyncio.to_thread(self._again)
            fixed = settings.unchangeable(self.settings, fresh)
            await self.cluster.apply(fresh)
        except HeadraceError as error:
            log.error("the settings were not taken over, the old ones stay: %s", error)
            raise
        else:
            self.settings = fresh
            self.jobs.apply(fresh)
            logging.getLogger("headrace").setLevel(fresh.log_level.upper())
            self.metrics.reloads += 1
            log.info("settings were read again from %s", fresh.where)
            if fixed:
                log.warning("%s will change with the next start", ", ".join(fixed))
        finally:
            self.phase = "ready"
            lifecycle.notify("READY=1", "STATUS=ready")

    # -- what happens

    def _job_ended(self, job: Job) -> None:
        self.metrics.job_ended(job)
        if job.report is not None:
            self.cluster.changed()

    def removed(self, domain: str, snapshot: str) -> None:
        """A snapshot has left the store: others need to hear that it is not here."""
        log.info("removed %s of the domain %s", snapshot[:12], domain)
        self.cluster.changed()

    async def used(self) -> int:
        """Bytes of the store on disk, as found at most half a minute ago."""
        at, size = self._usage
        if time.monotonic() - at > _USAGE_AGE:
            size = await asyncio.to_thread(evict.usage, self.store)
            self._usage = time.monotonic(), size
        return size

    def identity(self) -> dict[str, Any]:
        """Which agent this is, and of which store."""
        root = os.stat(self.store.root)
        return {
            "version": importlib.metadata.version("headrace"),
            "api": VERSION,
            "pid": os.getpid(),
            "phase": self.phase,
            "started": self.started,
            "settings": self.settings.where,
            "node": {"name": self.settings.name, "zone": self.settings.zone},
            "store": {"root": str(self.store.root), "device": root.st_dev, "inode": root.st_ino},
        }

    async def status(self) -> dict[str, Any]:
        """What the agent is doing."""
        found = self.identity()
        found["store"] |= {"used": await self.used(), "free": disk.free_bytes(self.store.root)}
        return {
            **found,
            "jobs": [job.as_json() for job in self.jobs.all()],
            "volumes": [volume.as_json() for volume in self.volumes.all()],
            "cluster": self.cluster.status(),
        }
