"""The cluster as one staging process sees it: who this node is, and its ways to the tracker and to other nodes.

`ClusterSettings` is plain data: an agent hands it to its staging processes as JSON. `Cluster.open` makes
of it what a run needs; nothing is asked of anybody then, and nobody has to be reachable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.cache.errors import UsageError
from headrace.cache.peers.client import PeerClient, PeerTimeouts
from headrace.cache.peers.security import SecurityFiles
from headrace.cache.policy.limits import Limits
from headrace.cache.tracker.failover import FailoverTracker
from headrace.cache.tracker.protocol import Peer, Tracker
from headrace.cache.tracker.redis import RedisTracker
from headrace.cache.tracker.settings import TrackerSettings
from headrace.cache.tracker.without import PeerTracker

GRACE = 3.0
"""Seconds for which nodes that always ask the origin share an answer: those that start together ask once."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """How a staging process takes part.

    Attributes:
        me: this node's agent, as other nodes reach it.
        tracker: the Redis or Valkey that the nodes share; None: they only know each other.
        static: other nodes that are known without a tracker: configured ones, or those that the agent saw last.
        security: where secrets and certificates are; secrets themselves are never in here.
        timeouts: of requests to other nodes.
        limits: of the policy.
        grace: seconds, see `GRACE`.
    """

    me: Peer
    tracker: TrackerSettings | None = None
    static: tuple[Peer, ...] = ()
    security: SecurityFiles = field(default_factory=SecurityFiles)
    timeouts: PeerTimeouts = field(default_factory=PeerTimeouts)
    limits: Limits = field(default_factory=Limits)
    grace: float = GRACE

    def as_json(self) -> dict[str, Any]:
        """For another process: addresses and names of files, no secret."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClusterSettings:
        """What `as_json` gave.

        Raises:
            UsageError: a key is unknown, missing or of the wrong kind.
        """
        tracker = values.get("tracker")
        try:
            return cls(
                Peer(**values["me"]),
                None if tracker is None else TrackerSettings.from_json(tracker),
                tuple(Peer(**peer) for peer in values.get("static", ())),
                SecurityFiles(**values.get("security", {})),
                PeerTimeouts(**values.get("timeouts", {})),
                Limits(**values.get("limits", {})),
                float(values.get("grace", GRACE)),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"the settings of the cluster are wrong ({error}).") from None


class Cluster:
    """What a run needs of the cluster; used from one event loop. `close` it.

    Attributes:
        me: this node.
        tracker: its way to the tracker.
        client: its way to other nodes.
    """

    def __init__(
        self,
        me: Peer,
        tracker: Tracker,
        client: PeerClient,
        *,
        limits: Limits | None = None,
        grace: float = GRACE,
    ) -> None:
        self.me = me
        self.tracker = tracker
        self.client = client
        self.limits = limits or Limits()
        self.grace = grace

    @classmethod
    def open(
        cls,
        settings: ClusterSettings,
        domain: str,
        note: Callable[[str], None] = lambda _: None,
        *,
        called: Callable[[], None] = lambda: None,
    ) -> Cluster:
        """For one trust domain: values at the tracker are sealed with the domain's secrets.

        Args:
            note: told when the tracker is lost.
            called: called with each call of the tracker.

        Raises:
            NotAuthenticated: a secret or certificate is missing or wrong.
            UsageError: the tracker cannot be meant.
            MissingDependency: its client library is not installed.
        """
        security = settings.security.load()
        client = PeerClient(security, timeouts=settings.timeouts, again=settings.security.load)
        tracker: Tracker
        tracker = without = PeerTracker(settings.me, settings.static, client, domain)
        if settings.tracker is not None:
            secrets = [secret.key for secret in security.secrets.get(domain, ())]
            place = settings.tracker.place

            def changed(away: bool) -> None:
                if away:
                    note(
                        f"the tracker {place} cannot be reached: this node goes on with the nodes known last."
                    )

            redis = RedisTracker(settings.tracker, settings.me, secrets)
            tracker = FailoverTracker(redis, without, changed=changed, called=called)
        return cls(settings.me, tracker, client, limits=settings.limits, grace=settings.grace)

    async def close(self) -> None:
        await self.tracker.close()
        await self.client.close()
