"""Ranks of a process group, each a process of its own that loads the same model: see `Team`.

Run as a program this is the launcher: it imports everything once, starts no thread, and forks the ranks, which
is as good as starting them, and a hundred times faster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from support.host_device import HostDevice
from support.page_cache import keep_code

from headrace.cache.errors import HeadraceError
from headrace.loader import Ranks, Rule, SlicePlan, Split, load, stream
from headrace.loader.digest import tensors_digest
from headrace.loader.readers.reader import FileReader


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: of the process, or minus the signal.
        said: digest, disk (bytes read from block devices), seconds, cpu, explain; or error and message.
    """

    code: int
    said: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.said.get("message", ""))


class Team:
    """Runs ranks. What still runs at the end is killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def load(
        self, store: Path, model: Path, count: int, *, special: Mapping[int, Mapping[str, Any]] | None = None,
        **common: Any
    ) -> list[Ended]:  # fmt: skip
        """Let `count` ranks load a model; see `work` for what may be asked of all, or of one of them."""
        store.unlink(missing_ok=True)
        tasks = [
            {"rank": rank, "count": count, "store": str(store), "model": str(model), **common}
            | dict((special or {}).get(rank, {}))
            for rank in range(count)
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(tasks) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the launcher has ended"
        return [Ended(code, said) for code, said in json.loads(line)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a rank does.

    Words of a task: load's names, patterns, read_path, root and threads; reference (instead of the model's
    folder); ranks (arguments of `Ranks`); slice_dim (along which each tensor is cut); device (load to one);
    take ("stream": tensors one by one); times (how often it loads); after (seconds before it begins); absent
    (never loads); alone (without the others). At the n-th block: at_block and signal (sends itself one), sleep_at
    (takes eight seconds), lose_at (its files become empty).
    """
    files: Any = dist  # torch's own annotations lack its stores
    dist.init_process_group(
        "gloo",
        store=files.FileStore(task["store"], task["count"]),
        rank=task["rank"],
        world_size=task["count"],
    )
    time.sleep(task.get("after", 0))
    if task.get("absent"):
        return {}
    group: Any = None if task.get("alone") else dist.group.WORLD
    if "ranks" in task:
        group = Ranks(group, **task["ranks"])
    more: dict[str, Any] = {
        word: task[word] for word in ("names", "patterns", "read_path", "root", "threads") if word in task
    }
    if "slice_dim" in task:
        more["slices"] = SlicePlan(task["rank"], task["count"], (Rule("*", Split(task["slice_dim"])),))
    if "at_block" in task:
        number = signal.Signals[task["signal"]]
        at_block(task["at_block"], lambda: os.kill(os.getpid(), number))
    if "sleep_at" in task:
        at_block(task["sleep_at"], lambda: time.sleep(8))
    if "lose_at" in task:
        at_block(task["lose_at"], lambda: lose(task["model"]))
    begun = time.monotonic(), from_disk(), time.process_time()
    said: dict[str, Any] = {}
    try:
        for _ in range(task.get("times", 1)):
            said = once(task, group, more)
    except HeadraceError as error:
        said = {"error": type(error).__name__, "message": str(error)}
    return spent(begun) | said


def spent(begun: tuple[float, int, float]) -> dict[str, Any]:
    seconds, disk, cpu = time.monotonic(), from_disk(), time.process_time()
    return {"seconds": seconds - begun[0], "disk": disk - begun[1], "cpu": cpu - begun[2]}


def once(task: dict[str, Any], group: Any, more: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic(), from_disk(), time.process_time()
    if task.get("take") == "stream":
        taken = {name: tensor.clone() for name, tensor in stream(task["model"], group=group, **more)}
        used = spent(begun)
        infos = load(task["model"]).infos
        return used | {"digest": tensors_digest(taken, {name: infos[name] for name in taken})}
    if task.get("device"):
        with HostDevice(delay=0.001) as device:
            loaded = load(task["model"], device, group=group, **more)
            return {"digest": loaded.digest(), "explain": loaded.stats.explain, "room": device.slab_bytes}
    loaded = load(task.get("reference", task["model"]), group=group, **more)
    said: dict[str, Any] = spent(begun) | {
        "digest": loaded.digest(),
        "explain": loaded.stats.explain,
        "read_path": loaded.stats.read_path,
    }
    if "slice_dim" in task:
        whole = load(task["model"]).tensors
        said["right"] = all(
            torch.equal(bits(tensor), bits(whole[name].chunk(task["count"], task["slice_dim"])[task["rank"]]))
            for name, tensor in loaded.tensors.items()
        )
    return said


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable, whatever numbers the bytes happen to be."""
    return tensor.contiguous().view(torch.int16)


def lose(model: str) -> None:
    """Let the model's files, as this process has them open, become empty."""
    empty = os.open(os.devnull, os.O_RDONLY)
    for entry in Path("/proc/self/fd").iterdir():
        if os.path.exists(entry) and str(entry.readlink()).startswith(model):
            os.dup2(empty, int(entry.name))
    os.close(empty)


def at_block(number: int, do: Callable[[], None]) -> None:
    """Do something when this process begins with its n-th block."""
    original: Callable[..., None] = FileReader.read
    seen = [0]

    def read(self: FileReader, block: Any) -> None:
        seen[0] += 1
        if seen[0] == number:
            do()
            time.sleep(0.5)  # a signal comes when it likes
        original(self, block)

    FileReader.read = read  # type: ignore[method-assign]


def from_disk() -> int:
    """Bytes that this process made block devices read."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io does not say")


def start(task: dict[str, Any]) -> tuple[int, int]:
    """Fork a rank: (process, pipe with what it says)."""
    ours, its = os.pipe()
    pid = os.fork()
    if pid:
        os.close(its)
        return pid, ours
    code = 1
    try:
        said = work(task)
        with open(its, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(tasks: Sequence[dict[str, Any]], running: list[tuple[int, int]]) -> list[tuple[int, dict[str, Any]]]:
    """Their ends. Ranks that stopped themselves are ended when all others have."""
    ended: list[tuple[int, dict[str, Any]]] = [(0, {})] * len(running)
    stopped = [place for place, task in enumerate(tasks) if task.get("signal") == "SIGSTOP"]
    for place in [*(p for p in range(len(running)) if p not in stopped), *stopped]:
        pid, pipe = running[place]
        if place in stopped:
            os.kill(pid, signal.SIGKILL)
        with open(pipe, "rb") as file:
            said = file.read()
        _, status = os.waitpid(pid, 0)
        ended[place] = (os.waitstatus_to_exitcode(status), json.loads(said) if said else {})
    running.clear()
    return ended


def main() -> None:
    keep_code()  # what ranks read from disks shall be the model
    running: list[tuple[int, int]] = []
    try:
        for line in sys.stdin:
            tasks = json.loads(line)
            running += [start(task) for task in tasks]
            print(json.dumps(wait(tasks, running)), flush=True)
    finally:
        for pid, _ in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
