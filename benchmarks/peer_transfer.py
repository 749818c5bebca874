"""Chunks from one process to another over loopback, verified and written, against a raw socket copy.

Rounds alternate in one run: headrace (peer server; client, xxh3-128, the stager's own way into a preallocated file,
marks), a whole `stage` from the same server, and sendfile -> recv_into -> pwrite into a preallocated file, with as
many connections. Claim: at least 0.8 x the throughput, once as it is and once with both processes in one memory cgroup
of 512 MiB, where the model comes off the disk and the disk has to take what is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cgroup
from benchmarks.measure import GB, Cost, end_cleanly, interval, machine, tree_cpu
from benchmarks.peer_roles import Role

LEAST = 0.8
LIMIT = 512 << 20

Wrap = Callable[[Sequence[str]], list[str]]


def _command(role: Role) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("peer_roles.py")), json.dumps(asdict(role))]


@contextmanager
def serving(role: Role, wrap: Wrap) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process id."""
    with subprocess.Popen(
        wrap(_command(role)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.stdin.close()
            process.wait()


def once(client: Role, pid: int, wrap: Wrap) -> tuple[Cost, float]:
    """One repetition in a process of its own; what it cost, and the server's CPU seconds."""
    os.sync()
    before = tree_cpu(pid)
    done = subprocess.run(wrap(_command(client)), capture_output=True, text=True, check=False)
    shutil.rmtree(client.target, ignore_errors=True)
    if done.returncode != 0:
        raise RuntimeError(f"{client.name} failed: {done.stderr[-2000:]}")
    return Cost(**json.loads(done.stdout)), tree_cpu(pid) - before


def drop(path: str) -> None:
    """Take a file out of the page cache, so that whoever reads it next is charged for it."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def compare(
    title: str,
    clients: Sequence[tuple[Role, int]],
    size: int,
    pairs: int,
    wrap: Wrap,
    prepare: Callable[[], None],
) -> dict[str, Any]:
    """Alternate; print and return the figures. `clients` each with its server; the last one is the raw copy."""
    rows: dict[str, list[tuple[Cost, float]]] = {role.name: [] for role, _ in clients}
    for number in range(-1, pairs):
        for role, pid in clients if number % 2 else list(reversed(clients)):
            prepare()
            result = once(role, pid, wrap)
            if number >= 0:  # the first pair is dropped
                rows[role.name].append(result)
    print(f"\n{title}: {size / GB:.2f} GB, {clients[0][0].connections} connections, {pairs} rounds")
    print(f"{'':10} {'GB/s':>22} {'client CPU s/GB':>22} {'server':>22}")
    report: dict[str, Any] = {}
    for name, row in rows.items():
        figures = [
            interval([size / GB / cost.wall for cost, _ in row]),
            interval([cost.cpu * GB / size for cost, _ in row]),
            interval([server * GB / size for _, server in row]),
        ]
        print(f"{name:10} " + " ".join(f"{f!s:>22}" for f in figures))
        report[name] = {k: f.as_dict() for k, f in zip(("rate", "client", "server"), figures, strict=True)}
    for name in (role.name for role, _ in clients[:-1]):
        pairs_of = zip(rows[name], rows["raw"], strict=True)
        ratio = interval([raw.wall / ours.wall for (ours, _), (raw, _) in pairs_of])
        met = ratio.median >= LEAST
        print(f"{name} / raw throughput {ratio} (claim >= {LEAST}): {'met' if met else 'NOT MET'}")
        report[name] |= {"ratio": ratio.as_dict(), "met": met}
    return report


def staged(model: Path, root: Path) -> str:
    """A store at `root` with the model in it; the object file's path."""
    from headrace.cache import staging
    from headrace.cache.prepare import StageRequest
    from headrace.cache.progress import Progress

    report = staging.run(staging.StagingJob(StageRequest(str(model), str(root)), Progress()))
    return str(Path(report.path) / "weights.bin")


def write_weights(path: Path, size: int) -> None:
    """Random bytes, so that nothing is shared or sparse."""
    path.parent.mkdir()
    with path.open("wb") as file:
        for start in range(0, size, 16 << 20):
            file.write(os.urandom(min(16 << 20, size - start)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a small model and few pairs: does it work at all"
    )
    parser.add_argument("--pairs", type=int, default=0, help="pairs of each comparison")
    parser.add_argument("--size", type=float, default=1.0, help="GiB of the model")
    parser.add_argument("--connections", type=int, default=4, help="at once (a stage: as it sees fit)")
    parser.add_argument("--span", type=int, default=16, help="MiB of one request of the raw copy")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--only", choices=["free", "group"], help="one part")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    size = int((0.0625 if options.smoke else options.size) * (1 << 30))
    pairs = options.pairs or (2 if options.smoke else 11)
    report: dict[str, Any] = {}
    end_cleanly()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        write_weights(scratch / "model" / "weights.bin", size)
        data = staged(scratch / "model", scratch / "store")
        secret = scratch / "secret"
        secret.write_text(os.urandom(32).hex())
        print(machine(scratch))
        ours = Role("headrace", str(scratch / "store"), str(scratch / "model"), secret=str(secret))
        raw = Role("raw", data)

        def run(title: str, wrap: Wrap, touch: bool, prepare: Callable[[], None]) -> dict[str, Any]:
            with serving(ours, wrap) as our_server, serving(raw, wrap) as raw_server:

                def client(role: Role, address: str) -> Role:
                    target = str(scratch / "target")
                    span, connections = options.span << 20, options.connections
                    return replace(
                        role, address=address, target=target, connections=connections, span=span, touch=touch
                    )

                clients = (
                    (client(ours, our_server[0]), our_server[1]),
                    (client(replace(ours, name="stage"), our_server[0]), our_server[1]),
                    (client(raw, raw_server[0]), raw_server[1]),
                )
                return compare(title, clients, size, pairs, wrap, prepare)

        if options.only in (None, "free"):
            report["free"] = run("from the page cache", list, True, lambda: None)
        if options.only in (None, "group"):
            if cgroup.available():
                group = stack.enter_context(cgroup.memory_group(LIMIT))
                title = f"both in one memory group of {LIMIT >> 20} MiB, from the disk"
                report["group"] = run(title, group.command, False, lambda: drop(data))
            else:
                print("\nleft out: no memory cgroup can be made here")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
