"""Loading while staging: how long after the last chunk was marked does `load` return?

Claim: at most max(5 % of the time, 0.3 s), with the origin limited to 300 MB/s and unlimited; with staging
and loading in one process, with the stager in a process of its own in a memory cgroup of 512 MiB, and with
both in such a cgroup on mapped tensors. Beside it the tensor-completion curve: when a fraction f >= 0.25
of the bytes has arrived, at least 0.8 f of them are in complete tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.cgroup import MemoryGroup, available, memory_group
from benchmarks.completion import Curve, watch
from benchmarks.measure import end_cleanly, machine, pretouch
from benchmarks.models import write_model
from support.faulty_server import spawn
from support.nginx import Nginx

LIMITED = 300e6
MEMORY = 512 << 20
SHARE, AT_LEAST = 0.05, 0.3
PREFIX = "model"


@dataclass(frozen=True, slots=True)
class Case:
    """Who does what: `apart` runs the stager in its own process, `limits` names who is in the cgroup."""

    name: str
    apart: bool
    limits: str
    read_path: str


CASES = (
    Case("one process", apart=False, limits="", read_path="auto"),
    Case("stager apart", apart=True, limits="", read_path="auto"),
    Case("stager in 512 MiB", apart=True, limits="stager", read_path="auto"),
    Case("both in 512 MiB, mapped", apart=False, limits="both", read_path="mapped"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds from the start to the last mark, and from there to the end of `load`."""

    staging: float
    tail: float
    read_path: str
    peak: int
    curve: Curve

    @property
    def allowed(self) -> float:
        return max(SHARE * (self.staging + self.tail), AT_LEAST)


# -- the processes that are measured; times are of CLOCK_MONOTONIC, which all processes share


def role_stage(url: str, root: str, read_path: str) -> dict[str, Any]:
    """Stage alone."""
    from headrace.cache import staging
    from headrace.cache.progress import Progress

    progress = Progress()
    start = time.monotonic()
    staging.stage(url, root=root, workers=1, progress=progress)
    return {"start": start, "last_mark": progress.last_mark}


def role_both(url: str, root: str, read_path: Any) -> dict[str, Any]:
    """Load a reference, which stages it in this process."""
    from headrace.cache.progress import Progress
    from headrace.loader import load

    progress = Progress()
    start = time.monotonic()
    loaded = load(url, root=root, read_path=read_path, progress=progress)
    end = time.monotonic()
    return {"start": start, "last_mark": progress.last_mark, "end": end, "read_path": loaded.stats.read_path}


def role_load(url: str, root: str, read_path: Any) -> dict[str, Any]:
    """Load what another process stages, and stage nothing."""
    from headrace.cache.errors import HeadraceError
    from headrace.cache.reading import StoredSnapshot
    from headrace.cache.store import Store
    from headrace.loader import load

    source = None
    while source is None:
        try:
            with Store.open(root, writable=False) as store:
                domain = next(store.domains())
                source = StoredSnapshot(domain, next(domain.snapshots()), name=url)
        except (HeadraceError, StopIteration, FileNotFoundError):
            time.sleep(0.002)  # until the stager has made the snapshot
    for file in source.manifest.files:
        while not domain.object(source.manifest.object_id(domain.name, file)).path.exists():
            time.sleep(0.002)  # and the objects
    try:
        loaded = load(source, read_path=read_path)
        end = time.monotonic()
    finally:
        source.close()
    return {"end": end, "read_path": loaded.stats.read_path}


ROLES = {"stage": role_stage, "both": role_both, "load": role_load}


@contextmanager
def process(role: str, url: str, root: Path, read_path: str, group: MemoryGroup | None) -> Iterator[Any]:
    """A measured process; ended when the block is left."""
    command = [sys.executable, __file__, "--role", role, url, str(root), read_path]
    if group is not None:
        command = group.command(command)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()  # imported
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def _go(child: Any) -> None:
    child.stdin.write("\n")
    child.stdin.flush()


def _answer(child: Any) -> dict[str, Any]:
    output = child.communicate()[0]
    if child.returncode != 0:
        raise RuntimeError(f"a measured process ended with {child.returncode}")
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def once(case: Case, url: str, model: Path, scratch: Path, size: int) -> Outcome:
    """One repetition of a case, into a fresh store."""
    root = scratch / "store"
    with ExitStack() as stack:
        group = stack.enter_context(memory_group(MEMORY)) if case.limits else None
        first = "stage" if case.apart else "both"
        stager = stack.enter_context(process(first, url, root, case.read_path, group))
        loader = stager
        if case.apart:
            loader = stack.enter_context(process("load", url, root, case.read_path, None))
            _go(loader)
        os.sync()
        pretouch(scratch, size * 3 // 2)
        _go(stager)
        curve = watch(root, model, stager)
        answer = _answer(stager)
        end = answer["end"] if loader is stager else 0.0
        read_path = answer.get("read_path", "")
        if loader is not stager:
            loaded = _answer(loader)
            end, read_path = loaded["end"], loaded["read_path"]
        peak = group.peak() if group is not None else 0
        last = answer["last_mark"]
        outcome = Outcome(last - answer["start"], end - last, read_path, peak, curve)
    shutil.rmtree(root)
    return outcome


def measure(label: str, url: str, model: Path, scratch: Path, size: int, repeat: int) -> dict[str, Any]:
    """Every case against one server; prints a row for each."""
    report = {}
    for case in CASES:
        if case.limits and not available():
            print(f"{label:12} {case.name:24} left out: needs a memory cgroup, and the right to make one")
            continue
        outcomes = [once(case, url, model, scratch, size) for _ in range(repeat)]
        met = sum(o.tail <= o.allowed for o in outcomes)
        tail = statistics.median(o.tail for o in outcomes)
        staging = statistics.median(o.staging for o in outcomes)
        allowed = statistics.median(o.allowed for o in outcomes)
        worst = min(o.curve.worst() for o in outcomes)
        peak = max(o.peak for o in outcomes)
        print(
            f"{label:12} {case.name:24} {staging:7.2f} s to the last mark, load {tail:6.3f} s later "
            f"(allowed {allowed:.3f}): {met} of {repeat} within; {outcomes[-1].read_path}; complete tensors at "
            f"least {worst:.2f} f" + (f"; peak {peak >> 20} MiB" if peak else "")
        )
        report[case.name] = {
            "staging": staging,
            "tail": tail,
            "allowed": allowed,
            "tails": [o.tail for o in outcomes],
            "within": met,
            "of": repeat,
            "worst_completion": worst,
            "peak": peak,
        }
        if case is CASES[0]:
            print(outcomes[-1].curve)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a small model, once: does it work at all")
    parser.add_argument("--repeat", type=int, default=0, help="repetitions of each case")
    parser.add_argument("--size", type=float, default=1.0, help="GiB of the model")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--role", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.role:
        return _role(*options.role)
    wanted = int((0.125 if options.smoke else options.size) * (1 << 30))
    repeat = options.repeat or (1 if options.smoke else 3)
    report: dict[str, Any] = {}
    end_cleanly()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scratch = Path(folder)
        model = scratch / "served" / PREFIX
        size = write_model(model, wanted, hidden=1024 if options.smoke else 2048)
        print(machine(scratch))
        print(f"a model of {size / 1e9:.2f} GB")
        with Nginx(scratch / "served", scratch / "nginx") as server:
            report["unlimited"] = measure("unlimited", f"{server.url}/{PREFIX}", model, scratch, size, repeat)
        with spawn(scratch / "served", rate=LIMITED) as limited:
            report["300 MB/s"] = measure("300 MB/s", f"{limited.url}/{PREFIX}", model, scratch, size, repeat)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    return 0


def _role(role: str, url: str, root: str, read_path: str) -> int:
    import headrace.cache.origins.web
    import headrace.cache.staging
    import headrace.loader  # noqa: F401

    print("imported", flush=True)
    sys.stdin.readline()
    print(json.dumps(ROLES[role](url, root, read_path)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
