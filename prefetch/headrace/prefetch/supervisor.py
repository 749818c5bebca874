"""The agent's side of a staging process: starts it, hears it, starts it again when it dies.

What a dead process had verified is in the store, so the next one goes on from there; a job whose process
dies again and again without having brought anything fails with a clear error.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from headrace.cache.bandwidth import Class
from headrace.cache.errors import AgentError
from headrace.cache.progress import Progress
from headrace.cache.staging import StageReport
from headrace.prefetch import messages
from headrace.prefetch.staging_process import Task

DEATHS = 4
"""How often the process of a job may die before the job fails."""
_PAUSE = 0.25  # seconds before the next one starts; doubled each time
_LINE = 16 << 20
_END = 10.0  # seconds that a process has to end after it was told so

log = logging.getLogger(__name__)


class Supervised:
    """One staging process after the other, for one job. Used by the agent's event loop only."""

    def __init__(
        self,
        task: Task,
        progress: Progress,
        *,
        opened: Callable[[str, str], None],
        moved: Callable[[], None],
    ) -> None:
        """
        Args:
            progress: what is counted; brought up to date before each call of `moved`.
            opened: called with domain and snapshot when it can be opened for reading.
            moved: called when the progress has changed.
        """
        self._task = task
        self._progress = progress
        self._counted = messages.Counted(progress)
        self._opened = opened
        self._moved = moved
        self._process: asyncio.subprocess.Process | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None else self._process.pid

    async def run(self) -> StageReport:
        """Stage; when cancelled, what is in flight is given up and the process has ended on return.

        Raises:
            HeadraceError: what staging ended with; AgentError: its process died too often.
        """
        deaths = 0
        while True:
            before = self._progress.chunks
            code, ended = await self._once()
            if ended is not None and "report" in ended:
                return messages.report_from_json(ended["report"])
            if ended is not None:
                raise messages.error_from_json(ended["error"])
            deaths = 1 if self._progress.chunks > before else deaths + 1
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            log.warning("the staging process of %s ended %s", self._task.request["reference"], how)
            if deaths >= DEATHS:
                raise AgentError(
                    f"the process that stages {self._task.request['reference']} ended {how}, {deaths} times in a row: "
                    "the agent's log has what it said."
                )
            self.restarts += 1
            self._counted.next_process()
            await asyncio.sleep(_PAUSE * 2 ** (deaths - 1))

    def pace(self, of: Class, rates: dict[str, float | None]) -> None:
        """Another class or other rates from now on, in bytes per second; None: no limit."""
        self._task = replace(self._task, of=of, rates=rates)
        self._tell(pace={"of": of, "rates": rates})

    async def _once(self) -> tuple[int, dict[str, Any] | None]:
        """One process: its exit code, and what it said at its end."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace.prefetch.staging_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._process = process
        # Not on the command line, which everybody on the machine may read.
        self._tell(**asdict(self._task))
        ended: dict[str, Any] | None = None
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                said = self._hear(line)
                ended = said or ended
            return await process.wait(), ended
        except asyncio.CancelledError:
            await self._end(process)
            raise
        finally:
            self._process = None
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _hear(self, line: bytes) -> dict[str, Any] | None:
        """Take in one line; what it says if it is the last."""
        try:
            said = json.loads(line)
        except ValueError:
            log.warning("a staging process said %r", line[:200])
            return None
        if "progress" in said:
            self._counted.take(said["progress"])
            self._moved()
        elif "opened" in said:
            self._opened(said["opened"]["domain"], said["opened"]["snapshot"])
        elif "report" in said or "error" in said:
            return dict(said)
        return None

    def _tell(self, **values: Any) -> None:
        if (
            self._process is not None
            and self._process.stdin is not None
            and not self._process.stdin.is_closing()
        ):
            self._process.stdin.write(json.dumps(values).encode() + b"\n")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Have it give up; it is killed if it takes too long, which the store survives as well."""
        self._tell(cancel=True)
        if process.stdin is not None:
            process.stdin.close()
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_END):
                # What it had done until now is counted, too.
                async for line in process.stdout:
                    self._hear(line)
                await process.wait()
        except TimeoutError:
            log.warning("a staging process did not end in time and was killed")
