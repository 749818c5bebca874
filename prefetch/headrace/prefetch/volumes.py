"""Per-pod sockets: one for each volume, whose rights are those of the volume.

::

    <volumes>/<volume>/volume.json     its trust domain and snapshots; the administrator alone reads it
                      /public/agent.sock   what is mounted into the pod: any uid may connect

A pod learns how far its own snapshots are, waits for them, and nothing else.

Crash story. The record is written and synced before the socket is made; a new agent makes the sockets of
all records again, in the same folders, so that a pod's mount of the folder shows the new one. A volume
that is removed loses its socket before its record. The folder is in /run: a reboot empties it, as it
does the mounts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from headrace.cache.durable import write_file
from headrace.cache.errors import AgentError, NotAllowed, NotFound, NotStaged, UsageError
from headrace.cache.inventory import entry
from headrace.cache.store import Store
from headrace.prefetch import sockets
from headrace.prefetch.answers import Lines, application

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_LOOK = 0.5  # seconds between two looks at a snapshot that is being staged
_LONGEST_WAIT = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume, and what its pod may see."""

    name: str
    domain: str
    snapshots: tuple[str, ...]
    socket: str

    def as_json(self) -> dict[str, Any]:
        return {
            "volume": self.name,
            "domain": self.domain,
            "snapshots": list(self.snapshots),
            "socket": self.socket,
        }


class Volumes:
    """All volumes of the agent, each with its socket. Used by its event loop only."""

    def __init__(self, folder: str, store: Store) -> None:
        self._folder = Path(folder)
        self._store = store
        self._open: dict[str, tuple[Volume, web.AppRunner]] = {}

    def all(self) -> list[Volume]:
        return [volume for volume, _ in self._open.values()]

    async def reopen(self) -> None:
        """Make the sockets of all volumes that an earlier agent had."""
        for record in sorted(self._folder.glob("*/volume.json")):
            try:
                told = json.loads(record.read_bytes())
                volume = self._volume(record.parent.name, told["domain"], told["snapshots"])
                await self._serve(volume)
            except (OSError, ValueError, KeyError, TypeError, AgentError, UsageError) as error:
                # One that is damaged must not keep the agent from the others.
                log.warning("the volume in %s is not served: %s", record.parent, error)

    async def add(self, name: str, domain: str, snapshots: list[str]) -> Volume:
        """Make a volume's socket; asking for the same again is no error.

        Raises:
            UsageError: a name that cannot be a folder, or the volume exists with other snapshots.
            AgentError: the socket cannot be made.
        """
        volume = self._volume(name, domain, snapshots)
        if name in self._open:
            if self._open[name][0] != volume:
                raise UsageError(f"the volume {name!r} exists with other snapshots: remove it first.")
            return volume
        record = {"domain": domain, "snapshots": list(volume.snapshots)}
        folder = self._folder / name
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            await asyncio.to_thread(write_file, folder / "volume.json", json.dumps(record).encode())
            await self._serve(volume)
        except OSError as error:
            raise AgentError(f"the folder of the volume {name!r} cannot be made: {error.strerror}.") from None
        return volume

    async def remove(self, name: str) -> None:
        """Close a volume's socket and forget it; not an error when there is none."""
        found = self._open.pop(name, None)
        if found is not None:
            await found[1].cleanup()
        if _NAME.match(name):
            await asyncio.to_thread(shutil.rmtree, self._folder / name, ignore_errors=True)

    async def close(self) -> None:
        """Close all sockets; their records stay for the next agent."""
        while self._open:
            _, (_, runner) = self._open.popitem()
            await runner.cleanup()

    def _volume(self, name: str, domain: str, snapshots: list[str]) -> Volume:
        if not _NAME.match(name):
            raise UsageError(f"{name!r} cannot be a volume: use letters, digits, dots, dashes, at most 128.")
        path = self._folder / name / "public" / "agent.sock"
        return Volume(name, domain, tuple(dict.fromkeys(snapshots)), str(path))

    async def _serve(self, volume: Volume) -> None:
        # Only its administrator removes it; a pod cannot put another there through a read-only mount.
        listener = sockets.listen(volume.socket, 0o666)
        runner = web.AppRunner(_build(volume, self._store), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        self._open[volume.name] = volume, runner


def _build(volume: Volume, store: Store) -> web.Application:
    this = _Pod(volume, store)
    return application(
        [
            web.get("/v1/snapshot", this.snapshot),
            web.get("/v1/progress", this.progress),
            web.get("/v1/wait", this.wait),
        ],
        lambda request: NotAllowed(
            f"a volume's socket does not take {request.method} {request.path}: it tells of the volume's snapshots, "
            "and nothing else."
        ),
    )


class _Pod:
    """What a pod may ask."""

    def __init__(self, volume: Volume, store: Store) -> None:
        self._volume = volume
        self._store = store

    async def snapshot(self, request: web.Request) -> web.Response:
        return web.json_response(await self._look(self._named(request)))

    async def progress(self, request: web.Request) -> web.StreamResponse:
        """A line whenever more is there, until all is."""
        name, lines, said = self._named(request), Lines(request), -1
        found = await self._look(name)
        answer = await lines.begin()
        while True:
            if found["present"] != said or found["staged"]:
                said = found["present"]
                await lines.say(progress=found)
            if found["staged"]:
                break
            await asyncio.sleep(_LOOK)
            found = await self._look(name)
        await answer.write_eof()
        return answer

    async def wait(self, request: web.Request) -> web.Response:
        """The answer comes when all is there, or when `timeout` seconds have passed."""
        try:
            timeout = min(float(request.query.get("timeout", _LONGEST_WAIT)), _LONGEST_WAIT)
        except ValueError:
            raise UsageError(f"a timeout is a number of seconds, not {request.query['timeout']!r}.") from None
        name = self._named(request)
        deadline = asyncio.get_running_loop().time() + timeout
        while not (found := await self._look(name))["staged"]:
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(_LOOK)
        return web.json_response(found)

    def _named(self, request: web.Request) -> str:
        """Which of the volume's snapshots is asked for. Raises NotAllowed for any other."""
        own = self._volume.snapshots
        name = request.query.get("id")
        if name is None:
            if len(own) == 1:
                return own[0]
            raise UsageError(f"the volume has {len(own)} snapshots: say which with ?id=.")
        if name not in own:
            # The same sentence whether it exists or not: a pod learns nothing of others.
            raise NotAllowed(f"the snapshot {name[:12]!r} is not one of this volume's.")
        return name

    async def _look(self, snapshot_id: str) -> dict[str, Any]:
        domain = self._store.domain(self._volume.domain)

        def look() -> dict[str, Any]:
            try:
                found = entry(domain, domain.snapshot(snapshot_id)).as_json()
            except NotStaged:
                raise NotFound(
                    f"the volume's snapshot {snapshot_id[:12]} is not in the store any more."
                ) from None
            return {key: found[key] for key in ("snapshot", "files", "bytes", "present", "staged")}

        return await asyncio.to_thread(look)
