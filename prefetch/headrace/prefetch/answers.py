"""What both kinds of sockets have in common: requests and answers as JSON, errors as one sentence, streams of lines."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from headrace.cache.errors import (
    AgentError,
    AgentUnavailable,
    HeadraceError,
    Held,
    NotAllowed,
    NotFound,
    NotStaged,
    UsageError,
)
from headrace.prefetch import messages
from headrace.prefetch.jobs import Job, Watcher
from headrace.prefetch.messages import UnknownRequest

VERSION = 1
"""Of the API: the first part of every path, `/v1`."""
MOST_BODY = 1 << 20
_BEAT = 15.0  # seconds after which a silent stream says something, so that both ends know of each other
_STATUS: tuple[tuple[type[HeadraceError], int], ...] = (
    (NotAllowed, 403),
    (UsageError, 400),
    (NotFound, 404),
    (NotStaged, 404),
    (Held, 409),
    (AgentUnavailable, 503),
)
UNKNOWN = 501
"""HTTP status of a request for something that this version does not have."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)


def application(
    handlers: list[web.RouteDef], elsewhere: Callable[[web.Request], HeadraceError]
) -> web.Application:
    """An application whose errors are ours; `elsewhere` makes the one for any other path or method."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except HeadraceError as error:
            return failure(error)
        except UnknownRequest as unknown:
            return failure(AgentError(f"{unknown}: it is of another version."), UNKNOWN)
        except web.HTTPException as refused:
            if refused.status in (404, 405):
                wrong = elsewhere(request)
                return failure(wrong, None if isinstance(wrong, NotAllowed) else refused.status)
            return failure(
                UsageError(f"the agent cannot take this request: {refused.reason}."), refused.status
            )

    app = web.Application(middlewares=[guard], client_max_size=MOST_BODY)
    app.add_routes(handlers)
    return app


def failure(error: HeadraceError, status: int | None = None) -> web.Response:
    if status is None:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    return web.json_response(messages.error_to_json(error), status=status)


async def body(request: web.Request) -> dict[str, Any]:
    """The object that a request carries; {} for none.

    Raises:
        UsageError: it carries something else.
    """
    raw = await request.read()
    try:
        found = json.loads(raw or b"{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"the body of {request.method} {request.path} has to be a JSON object.")
    return found


def text_of(values: dict[str, Any], name: str, default: str | None = None) -> str:
    """A text of a request's object. Raises UsageError when it is missing or something else."""
    value = values.get(name, default)
    if not isinstance(value, str) or not value:
        raise UsageError(f"the request lacks {name!r}, a text.")
    return value


class Lines:
    """An answer of JSON lines that goes on while there is something to say."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})

    async def begin(self) -> web.StreamResponse:
        await self._answer.prepare(self._request)
        return self._answer

    async def say(self, **values: Any) -> None:
        await self._answer.write(json.dumps(values).encode() + b"\n")


async def follow(request: web.Request, job: Job, watcher: Watcher) -> web.StreamResponse:
    """Say what a job does until it has ended: `job`, `progress`, `opened`, then `report` or `error`."""
    lines = Lines(request)
    answer = await lines.begin()
    await lines.say(job=job.id, version=VERSION)
    opened = False
    while True:
        watcher.changed.clear()
        if job.opened is not None and not opened:
            opened = True
            domain, snapshot = job.opened
            await lines.say(progress=messages.progress_to_json(job.progress))
            await lines.say(opened={"domain": domain, "snapshot": snapshot})
        await lines.say(progress=messages.progress_to_json(job.progress))
        if job.over:
            break
        try:
            async with asyncio.timeout(_BEAT):
                await watcher.changed.wait()
        except TimeoutError:
            continue
    if job.report is not None:
        await lines.say(report=messages.report_to_json(job.report))
    elif job.error is not None:
        await lines.say(**messages.error_to_json(job.error), stopping=job.stopped)
    await answer.write_eof()
    return answer
