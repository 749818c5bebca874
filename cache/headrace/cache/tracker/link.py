"""The connection to Redis or Valkey: opened on demand, checked once, every call within a time, errors as ours.

This is the one module that imports the client library.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any

from headrace.cache.errors import MissingDependency, TrackerUnavailable, UsageError
from headrace.cache.tracker.scripts import Script
from headrace.cache.tracker.settings import PASSWORD_VARIABLE, TrackerSettings

try:
    from redis import exceptions as errors
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
    from redis.backoff import NoBackoff
except ImportError:
    raise MissingDependency("a tracker in Redis needs `pip install 'headrace[cluster]'`.") from None

OLDEST = 7
"""Major version of Redis (and of what Valkey says it stands for), at least."""

CONNECTIONS = 8


class Link:
    """One node's connections to what `settings` name."""

    def __init__(self, settings: TrackerSettings) -> None:
        """Raises UsageError when a file that the settings name cannot be used."""
        self._settings = settings
        self._client, self._others = _clients(settings)
        self._checked = False

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """What a script returns. Raises TrackerUnavailable."""
        parts = (len(keys), *keys, *args)
        try:
            return await self._do("EVALSHA", script.sha, *parts)
        except errors.NoScriptError:
            # It never saw the script, was restarted, or is another server after a failover.
            return await self.command("EVAL", script.text, *parts)

    async def command(self, *parts: Any) -> Any:
        """What one command returns. Raises TrackerUnavailable."""
        try:
            return await self._do(*parts)
        except errors.NoScriptError as error:
            raise self._translate(error) from None

    async def commands(self, *commands: Sequence[Any]) -> list[Any]:
        """What several commands return, which take effect together. Raises TrackerUnavailable."""
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._check()
                pipeline = self._client.pipeline(transaction=True)
                for parts in commands:
                    pipeline.execute_command(*parts)
                found: list[Any] = await pipeline.execute()
                return found
        except (errors.RedisError, OSError, TimeoutError) as error:
            self._checked = False
            raise self._translate(error) from None

    async def close(self) -> None:
        for client in (self._client, *self._others):
            await client.aclose()

    async def _do(self, *parts: Any) -> Any:
        """Raises NoScriptError and TrackerUnavailable."""
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._check()
                return await self._client.execute_command(*parts)
        except errors.NoScriptError:
            raise
        except (errors.RedisError, OSError, TimeoutError) as error:
            self._checked = False
            raise self._translate(error) from None

    async def _check(self) -> None:
        """Raises TrackerUnavailable when it is not a server that can be used."""
        if self._checked:
            return
        info = await self._client.info("server")
        mode = str(info.get("redis_mode", info.get("server_mode", "")))
        if mode == "cluster":
            raise self._unusable(
                "is part of a Redis Cluster, which is not supported: use a single server or Sentinel"
            )
        if mode == "sentinel":
            raise self._unusable("is a Sentinel: write the url as redis+sentinel://host:port/service")
        version = str(info.get("redis_version", ""))
        if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < OLDEST:
            raise self._unusable(
                f"has version {version or 'unknown'}: Redis {OLDEST} or newer, or Valkey, is needed"
            )
        self._checked = True

    def _unusable(self, what: str) -> TrackerUnavailable:
        return TrackerUnavailable(f"the tracker at {self._settings.place} {what}.")

    def _translate(self, error: Exception) -> TrackerUnavailable:
        """One sentence, which never has a password or a key's content in it."""
        text = str(error)
        if isinstance(error, errors.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
            return self._unusable(
                f"refuses the password: look at `user`, `password_file` or ${PASSWORD_VARIABLE}"
            )
        if isinstance(error, errors.NoPermissionError):
            return self._unusable(
                "does not allow this user what headrace does: docs/tracker.md has the commands"
            )
        if isinstance(
            error,
            errors.MovedError | errors.AskError | errors.ClusterDownError | errors.ClusterCrossSlotError,
        ):
            return self._unusable(
                "is part of a Redis Cluster, which is not supported: use a single server or Sentinel"
            )
        if "CERTIFICATE" in text.upper() or "SSL" in text.upper():
            return self._unusable(
                "cannot be reached with TLS: look at `ca`, `certificate` and `key`, and its own certificate"
            )
        if isinstance(error, TimeoutError | errors.TimeoutError):
            return self._unusable(f"did not answer within {self._settings.timeout:g} s")
        if isinstance(error, errors.OutOfMemoryError):
            return self._unusable("has no memory left: raise its maxmemory")
        if isinstance(error, errors.ReadOnlyError):
            return self._unusable("is a replica that cannot be written")
        if isinstance(error, errors.BusyLoadingError):
            return self._unusable("is still loading its data")
        if isinstance(error, MasterNotFoundError):
            return self._unusable(
                "is not there: Sentinel knows no running server of that name, or does not answer"
            )
        if isinstance(error, errors.ConnectionError | OSError):
            return self._unusable("cannot be reached, or cut the connection")
        return self._unusable(
            f"has something under the prefix {self._settings.prefix!r} that headrace did not write, or does not know "
            f"a command ({text.split(':')[0][:80]}): choose another prefix, or delete those keys"
        )


def _clients(settings: TrackerSettings) -> tuple[Redis, list[Redis]]:
    """A client of the server, and those of the Sentinels that know where it is."""
    _check_files(settings)
    common: dict[str, Any] = {
        # Every call has its time from `_do` and `commands`. The library keeps its own with `asyncio.wait_for`, which
        # before Python 3.12 loses a cancellation that comes when the bytes are just written: the call then goes on.
        "socket_timeout": None,
        "socket_connect_timeout": settings.timeout,
        # A connection that a restart of the server has cut is found out at the next call, and replaced.
        "retry": Retry(NoBackoff(), 1),
        "protocol": 2,
        "max_connections": CONNECTIONS,
    }
    if settings.tls:
        common |= {
            "ssl": True,
            "ssl_ca_certs": settings.ca,
            "ssl_certfile": settings.certificate,
            "ssl_keyfile": settings.key,
        }
    server = {
        **common,
        "db": settings.database(),
        "username": settings.user,
        "password": settings.password(),
    }
    if not settings.sentinel:
        host, port = settings.servers()[0]
        return Redis(host=host, port=port, **server), []
    sentinel = {**common, "username": settings.sentinel_user, "password": settings.sentinel_password()}
    watched = Sentinel(settings.servers(), sentinel_kwargs=sentinel, **server)
    return watched.master_for(settings.service), watched.sentinels


def _check_files(settings: TrackerSettings) -> None:
    """Raises UsageError when a certificate cannot be used; at the first connection it would look like the server's."""
    if not settings.tls:
        return
    try:
        named = settings.ca
        context = ssl.create_default_context(cafile=named)
        named = settings.certificate
        if named is not None:
            context.load_cert_chain(named, settings.key)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise UsageError(f"the tracker's certificate file {named!r} cannot be used: {reason}.") from None
