"""Asking the node's agent over its socket; the standard library only, so that commands stay light."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from headrace.cache.errors import AgentError, AgentUnavailable
from headrace.prefetch import messages

DEFAULT_SOCKET = "/run/headrace/agent.sock"
_PATIENCE = 30.0
_SILENCE = 60.0  # seconds without a line after which a stream is given up; the agent speaks more often
_DIFFERS, _UNKNOWN = 409, 501
_HEADERS = {"Content-Type": "application/json"}


class Unsuited(Exception):
    """The agent runs, but would not do what is meant: its text says why, as the end of a sentence."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class AgentClient:
    """Questions to the agent at one socket; each takes a connection of its own."""

    def __init__(self, path: str | None = None) -> None:
        """
        Args:
            path: of the socket; by default $HEADRACE_SOCKET, else the node's.
        """
        self.path = path or os.environ.get("HEADRACE_SOCKET") or DEFAULT_SOCKET

    @property
    def there(self) -> bool:
        """Whether an agent accepts connections from this user."""
        if not os.path.exists(self.path):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(self.path)
            except OSError:
                return False
        return True

    def ask(
        self, method: str, path: str, values: Mapping[str, Any] | None = None, **query: str | None
    ) -> dict[str, Any]:
        """One question, one answer.

        Raises:
            AgentUnavailable: nobody answers.
            HeadraceError: what the agent answers instead.
            Unsuited: it would do something else than is meant.
        """
        given = {name: value for name, value in query.items() if value is not None}
        body = None if values is None else json.dumps(values)
        with self.connected() as connection, self._translated():
            connection.request(method, f"{path}?{urlencode(given)}" if given else path, body, _HEADERS)
            answer = connection.getresponse()
            if answer.status >= 400:
                _refused(answer)
            return _object(answer.read())

    def stream(self, method: str, path: str, values: Mapping[str, Any] | None = None) -> Stream:
        """One question, an answer of many lines. Raises as `ask`."""
        return Stream(self, method, path, values)

    @contextlib.contextmanager
    def connected(self) -> Iterator[http.client.HTTPConnection]:
        """A connection for one request."""
        connection = _Connection(self.path, _PATIENCE)
        try:
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """The only place where what a socket refuses becomes an error of ours."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "the connection broke"
            raise AgentUnavailable(
                f"the agent at {self.path!r} cannot be asked ({why}): is it running, and is this its user?"
            ) from None


class Stream:
    """An answer of many lines; closed from any thread, which ends the iteration."""

    def __init__(self, client: AgentClient, method: str, path: str, values: Mapping[str, Any] | None) -> None:
        self._client = client
        self._connection = _Connection(client.path, _SILENCE)
        self._closing = threading.Event()
        self._read = False
        try:
            with client._translated():
                body = None if values is None else json.dumps(values)
                self._connection.request(method, path, body, _HEADERS)
                # Kept, so that it can be shut down while another thread reads.
                self._socket = self._connection.sock
                self._answer = self._connection.getresponse()
                if self._answer.status >= 400:
                    _refused(self._answer)
        except BaseException:
            self._connection.close()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Its lines until it ends. Raises AgentUnavailable when it breaks off."""
        self._read = True
        try:
            with self._client._translated():
                while line := self._answer.readline():
                    yield _object(line)
        except AgentUnavailable:
            if not self._closing.is_set():
                raise
        finally:
            self._release()

    def close(self) -> None:
        """End it: the agent learns at once that nobody listens."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._read:
            self._release()

    def _release(self) -> None:
        self._answer.close()
        self._connection.close()


def _refused(answer: http.client.HTTPResponse) -> None:
    values = _object(answer.read())
    if answer.status == _DIFFERS and "differs" in values:
        raise Unsuited(str(values["differs"]))
    if answer.status == _UNKNOWN:
        raise Unsuited(str(values.get("error", {}).get("message", "it is of another version")))
    raise messages.error_from_json(values.get("error", {}))


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AgentError(f"the agent answered with something that is no JSON object: {data[:80]!r}.")
    return found


def same_store(status: Mapping[str, Any], root: Path) -> bool:
    """Whether the agent's store is the one at `root`, by whatever paths either of them sees it."""
    try:
        seen = os.stat(root)
    except OSError:
        return False
    store = status.get("store", {})
    return (seen.st_dev, seen.st_ino) == (store.get("device"), store.get("inode"))
