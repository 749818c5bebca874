"""The program of `support.processes`: forks one process per task, each of which may kill itself at a chosen spot.

Reads tasks as JSON lines on standard input, answers each with one JSON line. Everything is imported
once and no thread runs here, so a forked process is as good as a started one, and a hundred times faster.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from support.models import CHUNK, PATIENT, stage_small

import headrace.cache
from headrace.cache import chunkmap
from headrace.cache import filling as fillings
from headrace.cache import repair as repairing
from headrace.cache.errors import HeadraceError
from headrace.cache.origins import local, obstore, web
from headrace.cache.stager import StagerLimits
from headrace.cache.store import Store

PACKAGE = str(Path(headrace.cache.__file__).parent)
ORIGINS = (local, obstore, web)  # imported here, so that no task has to


def stage(task: dict[str, Any]) -> dict[str, Any]:
    fillings._SYNC_AFTER = task.get("sync_after", fillings._SYNC_AFTER)
    limits = StagerLimits(span=task.get("span", CHUNK), connections=task.get("connections", 4), reserve=0)
    report = stage_small(task["reference"], Path(task["root"]), workers=task.get("workers", 1), limits=limits)
    return {"snapshot": report.snapshot, "sources": report.sources}


def repair(task: dict[str, Any]) -> dict[str, Any]:
    with Store.open(task["root"]) as store:
        domain = store.domain()
        report = repairing.repair(store, domain, domain.snapshot(task["snapshot"]), options=PATIENT)
    return {"snapshot": report.snapshot, "sources": report.sources}


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"stage": stage, "repair": repair}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(name: str, nth: int, when: str) -> None:
    """Be killed just before or after the n-th call of `os.<name>`."""
    original = getattr(os, name)
    lock = threading.Lock()
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls
        if mine == nth and when == "before":
            die()
        result = original(*args, **more)
        if mine == nth:
            die()
        return result

    setattr(os, name, counted)


def die_at_line(module: str, line: int, nth: int) -> None:
    """Be killed just before the n-th time that a line of `headrace.cache.<module>` runs, in any thread."""
    seen = 0

    def at_line(where: str, number: int) -> None:
        nonlocal seen
        if (where, number) == (module, line):
            seen += 1
            if seen >= nth:
                die()

    _trace({module}, at_line)


def count_lines(modules: set[str]) -> Counter[tuple[str, int]]:
    """How often each line of the modules runs from now on."""
    lines: Counter[tuple[str, int]] = Counter()

    def at_line(where: str, number: int) -> None:
        lines[where, number] += 1

    _trace(modules, at_line)
    return lines


def _trace(modules: set[str], at_line: Callable[[str, int], None]) -> None:
    files = {os.path.join(PACKAGE, f"{module}.py"): module for module in modules}

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None

        def inside(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                at_line(module, frame.f_lineno)
            return inside

        return inside

    threading.settrace(enter)
    sys.settrace(enter)


def work(task: dict[str, Any], out: int) -> None:
    """Do a task in this forked process, and write its result."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    if "boot" in task:
        boot: str = task["boot"]
        chunkmap.boot_id = lambda: boot
    if "die_at_call" in task:
        die_at_call(*task["die_at_call"])
    if "die_at_line" in task:
        die_at_line(*task["die_at_line"])
    lines = count_lines(set(task["count_lines"])) if "count_lines" in task else None
    try:
        result = JOBS[task["do"]](task)
    except HeadraceError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    sys.settrace(None)
    if lines is not None:
        result["lines"] = [[module, line, n] for (module, line), n in sorted(lines.items())]
    with open(out, "wb") as file:
        file.write(json.dumps(result).encode())


def main() -> None:
    pipes: dict[int, int] = {}
    try:
        for line in sys.stdin:
            task = json.loads(line)
            if "wait" in task:
                pid = task["wait"]
                with open(pipes[pid], "rb") as pipe:
                    said = pipe.read()
                _, status = os.waitpid(pid, 0)
                del pipes[pid]
                code = os.waitstatus_to_exitcode(status)
                answer = {"code": code, "result": json.loads(said) if code == 0 else {}}
            else:
                result, out = os.pipe()
                pid = os.fork()
                if pid == 0:
                    pipes.clear()
                    work(task, out)
                    return
                os.close(out)
                pipes[pid] = result
                answer = {"pid": pid}
            print(json.dumps(answer), flush=True)
    finally:
        for pid in pipes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
