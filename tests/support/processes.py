"""Stagers and repairs in processes of their own: to be killed, stopped, and raced against each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code (minus the signal), and what it reported."""

    code: int
    result: dict[str, Any]

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Victim:
    """One running task."""

    def __init__(self, launcher: Launcher, pid: int) -> None:
        self._launcher = launcher
        self.pid = pid

    def wait(self) -> Ended:
        """Its end. A failed process has said why on standard error."""
        answer = self._launcher.ask({"wait": self.pid})
        ended = Ended(answer["code"], answer["result"])
        assert ended.code in (0, -signal.SIGKILL), f"a process ended with {ended.code}"
        return ended

    def kill(self) -> Ended:
        """SIGKILL it; returns when it and the worker processes that it started are gone."""
        workers = self.workers()
        self.signal(signal.SIGKILL)
        ended = self.wait()
        deadline = time.monotonic() + _PATIENCE
        while any(os.path.exists(f"/proc/{pid}") and not _is_zombie(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.01)
        return ended

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def workers(self) -> list[int]:
        """The processes that it has started."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            more = [p.read_text().split() for p in Path(f"/proc/{self.pid}/task").glob("*/children")]
        except (FileNotFoundError, ProcessLookupError):
            return []
        return sorted({int(pid) for pid in [*children, *(p for part in more for p in part)]})


def is_staging(pid: int) -> bool:
    """Whether a process has an object open, and so its shared lock."""
    try:
        opened = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except FileNotFoundError:
        return False
    return any(path.endswith("/partial") for path in opened)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Launcher:
    """Starts processes fast: see `victim`. What still runs at the end is killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, do: str = "stage", **task: Any) -> Victim:
        """Start a task: see `victim.stage` and `victim.repair` for their words."""
        task = {key: str(value) if isinstance(value, Path) else value for key, value in task.items()}
        return Victim(self, self.ask({"do": do, **task})["pid"])

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the launcher has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        # Also closes the pipes.
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
