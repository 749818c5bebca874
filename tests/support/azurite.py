"""Azurite, Microsoft's emulator of Azure Blob Storage, from npm (`node_modules/` of the checkout).

`make setup` installs it with `INSTALL`; `installed` says whether that was done.
"""

from __future__ import annotations

import base64
import hmac
import http.client
import shutil
import socket
import subprocess
import time
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

VERSION = "3.35.0"
"""The last one that runs on the Node.js 18 and 20 of current distributions; later ones want 21 or 22."""

INSTALL = (
    "npm", "install", "--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts",
    "--prefix", ".", f"azurite@{VERSION}",
)  # fmt: skip

ACCOUNT = "devstoreaccount1"
# The emulator's well-known account: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_CHECKOUT = Path(__file__).resolve().parents[2]
_PROGRAM = _CHECKOUT / "node_modules" / ".bin" / "azurite-blob"
_PATIENCE = 60.0  # seconds


def installed() -> bool:
    return _PROGRAM.exists() and shutil.which("node") is not None


def install() -> None:
    """Install it into the checkout, unless it is there."""
    if not installed():
        subprocess.run(INSTALL, cwd=_CHECKOUT, check=True, stdout=subprocess.DEVNULL)


class Azurite:
    """The blob service on a free port of loopback, its data in `directory`."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._directory = directory
        self._log = directory / "azurite.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Base URL, with the account as its path."""
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def start(self) -> None:
        command = [
            str(_PROGRAM), "--silent", "--skipApiVersionCheck", "--disableTelemetry",
            "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self._directory),
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Azurite did not start: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def create_container(self, name: str) -> None:
        self._call("PUT", name, query={"restype": "container"})

    def put(self, container: str, path: str, data: bytes) -> None:
        self._call("PUT", f"{container}/{path}", data, {"x-ms-blob-type": "BlockBlob"})

    def get(self, container: str, path: str) -> bytes:
        return self._call("GET", f"{container}/{path}")

    def delete(self, container: str, path: str) -> None:
        self._call("DELETE", f"{container}/{path}")

    def _call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
    ) -> bytes:
        """One request, signed with the account's key ("Authorize with Shared Key", Azure Storage REST)."""
        sent = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02", **(headers or {})}
        url = f"/{ACCOUNT}/{quote(path)}"
        lines = [method, "", "", str(len(body)) if body else "", *[""] * 8]
        lines += [f"{name}:{sent[name]}" for name in sorted(sent)]
        lines += [f"/{ACCOUNT}{url}", *(f"{name}:{value}" for name, value in sorted((query or {}).items()))]
        digest = hmac.digest(base64.b64decode(KEY), "\n".join(lines).encode(), "sha256")
        sent["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"{url}?{urlencode(query or {})}" if query else url, body, sent)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise RuntimeError(f"Azurite answered {method} {path} with {response.status}: {data[:500]!r}")
        return data

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()
        return True
