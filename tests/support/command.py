"""The `headrace` command as a user runs it: a process of its own, with an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOREIGN = ("AWS_", "GOOGLE_", "AZURE_", "OSS_", "HF_", "STORAGE_EMULATOR_", "HEADRACE_", "XDG_")
_COMMAND = (sys.executable, "-m", "headrace.cli.main")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that standard output has to consist of."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        assert self.out.count("\n") == 1
        return found


@dataclass
class Command:
    """Runs `headrace` with `home` as the user's home and `root` as the store."""

    home: Path
    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and "proxy" not in k.lower()
        }
        return {**kept, "HOME": str(self.home), "HEADRACE_ROOT": str(self.root), **self.environ}

    def __call__(self, *args: str | Path, code: int = 0) -> Result:
        """Run to the end; it has to end with `code`."""
        done = subprocess.run(
            [*_COMMAND, *map(str, args)], capture_output=True, text=True, env=self.environment(), check=False
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *args: str | Path, **popen: Any) -> subprocess.Popen[str]:
        """Start it in a process group of its own, with pipes unless told otherwise."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
        return subprocess.Popen(
            [*_COMMAND, *map(str, args)], env=self.environment(), start_new_session=True, **streams
        )

    def interrupted_when(
        self, ready: Callable[[], bool], *args: str | Path, signum: signal.Signals = signal.SIGINT
    ) -> Result:
        """Start it, and send a signal as soon as `ready` says so."""
        with self.start(*args) as process:
            wait_until(lambda: ready() or process.poll() is not None)
            process.send_signal(signum)
            out, err = process.communicate(timeout=60)
        return Result(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
