"""The programs that are compared: each brings the same files to a fresh folder.

Run in a process of its own: `python benchmarks/clients.py '<Task as JSON>'` prints a `Result` as JSON.
Imports are outside of what is measured, making a client and connecting are inside; listing is inside for
those that list (headrace, rclone), and given to those that do not.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Cost, now, pretouch

RANGE = 16 << 20
CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Task:
    """What to bring where.

    Attributes:
        client: a key of `CLIENTS`.
        url: of the server, without a trailing slash.
        bucket: "" for plain HTTP.
        prefix: the folder of the files.
        files: (name, size) of each.
        target: a folder that does not exist.
        workers: of headrace; 0 as it sees fit.
        connections: of each of headrace's workers at most; 0 as it sees fit.
    """

    client: str
    url: str
    bucket: str
    prefix: str
    files: tuple[tuple[str, int], ...]
    target: str
    workers: int = 0
    connections: int = 0
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """Cost until the last byte was written, and until all was synced (and, by headrace, linked)."""

    written: Cost
    synced: Cost


def run(task: Task) -> Result:
    """Run a client in a process of its own.

    Raises:
        RuntimeError: it failed; with its error output.
    """
    spec = {**asdict(task), "files": [list(f) for f in task.files]}
    environ = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | task.environ
    command = [sys.executable, __file__, json.dumps(spec)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{task.client} failed: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Result(Cost(**answer["written"]), Cost(**answer["synced"]))


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)


def _pretouch(task: Task) -> None:
    pretouch(Path(task.target).parent, 2 * sum(size for _, size in task.files))


def _measured(task: Task, work: Callable[[], object]) -> Result:
    Path(task.target).mkdir(parents=True)
    _pretouch(task)
    start = now()
    work()
    written = now() - start
    _sync_tree(Path(task.target))
    return Result(written, now() - start)


def _obstore(task: Task) -> Any:
    from obstore.store import HTTPStore, S3Store

    if not task.bucket:
        return HTTPStore(task.url, client_options={"allow_http": True, "timeout": timedelta(days=1)})
    return S3Store(
        task.bucket,
        config={"aws_endpoint_url_s3": task.url, "region": "us-east-1"},
        client_options={"allow_http": True, "timeout": timedelta(days=1)},
    )


def bare_threads(task: Task) -> Result:
    """obstore ranges in threads, written into preallocated files."""
    import obstore
    import obstore.store

    def work() -> None:
        store = _obstore(task)
        with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
            jobs = []
            descriptors = []
            for name, size in task.files:
                fd = os.open(Path(task.target) / name, os.O_RDWR | os.O_CREAT)
                descriptors.append(fd)
                if size:
                    os.posix_fallocate(fd, 0, size)

                def bring(key: str, fd: int, start: int, stop: int) -> None:
                    data = obstore.get(store, key, options={"range": (start, stop)}).bytes()
                    if len(data) != stop - start or os.pwrite(fd, data, start) != len(data):
                        raise RuntimeError(f"short read of {key}")

                for start in range(0, size, RANGE):
                    stop = min(size, start + RANGE)
                    jobs.append(pool.submit(bring, f"{task.prefix}/{name}", fd, start, stop))
            for job in jobs:
                job.result()
            for fd in descriptors:
                os.close(fd)

    return _measured(task, work)


def headrace(task: Task) -> Result:
    """`stage` into an empty store."""
    from benchmarks.marks import Sampled

    from headrace.cache import origins, stager, staging  # noqa: F401
    from headrace.cache.origins import http_listing, obstore, web  # noqa: F401
    from headrace.cache.prepare import StageRequest
    from headrace.cache.stager import StagerLimits

    source = f"s3://{task.bucket}/{task.prefix}" if task.bucket else f"{task.url}/{task.prefix}"
    progress = Sampled()
    _pretouch(task)
    start = now()
    limits = StagerLimits(connections=task.connections) if task.connections else StagerLimits()
    request = StageRequest(source, task.target, workers=task.workers or None, limits=limits)
    staging.run(staging.StagingJob(request, progress))
    end = now()
    assert progress.at_last_mark is not None
    return Result(progress.at_last_mark - start, end - start)


def boto3_transfer(task: Task) -> Result:
    """boto3's transfer manager, 16 MiB parts, 8 threads."""
    import boto3
    from boto3.s3.transfer import TransferConfig

    client = boto3.client("s3", endpoint_url=task.url, region_name="us-east-1")
    config = TransferConfig(multipart_threshold=RANGE, multipart_chunksize=RANGE, max_concurrency=CONCURRENCY)

    def work() -> None:
        for name, _ in task.files:
            client.download_file(
                task.bucket, f"{task.prefix}/{name}", str(Path(task.target) / name), Config=config
            )

    return _measured(task, work)


def s3fs_get_file(task: Task) -> Result:
    """s3fs.get_file, file by file."""
    import s3fs

    system = s3fs.S3FileSystem(endpoint_url=task.url, client_kwargs={"region_name": "us-east-1"})

    def work() -> None:
        for name, _ in task.files:
            system.get_file(f"{task.bucket}/{task.prefix}/{name}", str(Path(task.target) / name))

    return _measured(task, work)


def rclone_copy(task: Task) -> Result:
    """rclone copy, 8 streams for each of 4 files."""
    program = Path(sys.executable).with_name("rclone")
    environ = {
        **os.environ,
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
        "RCLONE_CONFIG_BENCH_ENV_AUTH": "true",
        "RCLONE_CONFIG_BENCH_ENDPOINT": task.url,
        "RCLONE_CONFIG": os.devnull,
    }
    command = [str(program), "copy", f"bench:{task.bucket}/{task.prefix}", task.target]
    command += ["--multi-thread-streams", str(CONCURRENCY), "--multi-thread-chunk-size", "16M", "-q"]
    return _measured(task, lambda: subprocess.run(command, env=environ, check=True))


CLIENTS: dict[str, Callable[[Task], Result]] = {
    "bare": bare_threads,
    "headrace": headrace,
    "boto3": boto3_transfer,
    "s3fs": s3fs_get_file,
    "rclone": rclone_copy,
}


def main() -> int:
    values = json.loads(sys.argv[1])
    values["files"] = tuple((name, size) for name, size in values["files"])
    task = Task(**values)
    print(json.dumps(asdict(CLIENTS[task.client](task))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
