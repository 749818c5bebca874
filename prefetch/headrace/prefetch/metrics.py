"""What the agent has done and is doing, for Prometheus. The contract: docs/metrics.md, which a test compares.

Everything is read when it is asked for, from where it is counted anyway.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headrace.cache import disk
from headrace.cache.bandwidth import CLASSES
from headrace.cache.progress import SOURCES

if TYPE_CHECKING:
    from headrace.prefetch.agent import Agent
    from headrace.prefetch.jobs import Job

_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

_DONE = (
    ("tracker_calls", "headrace_tracker_worker_calls", "Calls of the tracker by staging processes."),
    ("claims", "headrace_claims", "Claims to read a chunk from the origin that were granted."),
    ("claims_returned", "headrace_claims_returned", "Of these, given back without having brought the chunk."),
    ("second_tries", "headrace_second_tries", "Slow transfers that got another one beside them."),
    ("peers_left_alone", "headrace_peers_left_alone", "Peers left alone for wrong bytes or many failures."),
)


class Metrics(Collector):
    """The agent's metrics, in a registry of their own."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._used = 0
        self.reloads = 0
        self._hits = self._misses = self._present = 0
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "headrace_staging_seconds",
            "How long staged jobs took, from their first to their last byte on disk.",
            ("class",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        for of in CLASSES:
            self._seconds.labels(of)
        self._registry.register(self)

    def job_ended(self, job: Job) -> None:
        """Count a job that has ended."""
        if job.report is None:
            return
        fetched = sum(job.progress.fetched.values())
        self._present += max(0, job.progress.total - fetched)
        if fetched:
            self._misses += 1
        else:
            self._hits += 1
        self._seconds.labels(job.of).observe(job.report.seconds)

    async def answer(self, _: web.Request) -> web.Response:
        """The answer to a scrape."""
        self._used = await self._agent.used()
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    def collect(self) -> Iterator[Metric]:
        agent = self._agent
        version = importlib.metadata.version("headrace")
        yield _gauge("headrace_agent_info", "Which version runs; always 1.", {(version,): 1}, "version")
        yield _gauge(
            "headrace_agent_start_time_seconds", "When the agent started, since the epoch.", agent.started
        )
        yield _gauge("headrace_agent_ready", "1 while the agent takes work.", int(agent.ready))
        yield _counter(
            "headrace_agent_reloads", "Settings that were read again and taken over.", self.reloads
        )
        yield from self._jobs()
        yield _gauge("headrace_store_used_bytes", "Bytes of the store on disk, each inode once.", self._used)
        free = disk.free_bytes(agent.store.root)
        yield _gauge("headrace_store_free_bytes", "Bytes that may still be written to its file system.", free)
        yield _gauge("headrace_volumes", "Volumes with a socket of their own.", len(agent.volumes.all()))
        yield from self._cluster()

    def _jobs(self) -> Iterator[Metric]:
        jobs = self._agent.jobs
        fetched = {(source,): jobs.fetched.get(source, 0) for source in SOURCES}
        yield _counter("headrace_fetched_bytes", "Verified bytes brought into the store.", fetched, "source")
        yield _counter("headrace_present_bytes", "Bytes that staged jobs found here already.", self._present)
        yield _counter("headrace_cache_hits", "Staged jobs that had nothing to fetch.", self._hits)
        yield _counter("headrace_cache_misses", "Staged jobs that had something to fetch.", self._misses)
        active = dict.fromkeys(((state, of) for state in ("waiting", "running") for of in CLASSES), 0)
        for job in jobs.active():
            if (job.state, job.of) in active:
                active[job.state, job.of] += 1
        yield _gauge("headrace_jobs", "Jobs that have not ended.", active, "state", "class")
        ended = {(state,): number for state, number in jobs.counts.items()}
        yield _counter("headrace_jobs_ended", "Jobs that have ended.", ended, "outcome")
        yield _counter("headrace_staging_process_restarts", "Staging processes that had died.", jobs.restarts)

    def _cluster(self) -> Iterator[Metric]:
        part = self._agent.cluster
        stats = part.uploads()
        sent = {(of,): stats.sent.get(of, 0) for of in CLASSES}
        done = {(of,): stats.uploads.get(of, 0) for of in CLASSES}
        active = {(of,): stats.active.get(of, 0) for of in CLASSES}
        yield _counter("headrace_uploaded_bytes", "Bytes of chunks given to other nodes.", sent, "class")
        yield _counter("headrace_uploads", "Chunk requests of other nodes that were answered.", done, "class")
        yield _gauge("headrace_uploads_active", "Uploads under way.", active, "class")
        yield _counter("headrace_uploads_busy", "Requests refused as no upload slot was free.", stats.busy)
        yield _counter("headrace_uploads_refused", "Requests refused by token or certificate.", stats.refused)
        yield _gauge(
            "headrace_peer_connections", "Connections of other nodes that are open.", stats.connections
        )
        announced = len(part.announced)
        yield _gauge("headrace_snapshots_announced", "Snapshots that the tracker was told of.", announced)
        yield _gauge("headrace_peers", "Other nodes that are known.", len(part.members))
        yield _gauge(
            "headrace_tracker_degraded", "1 while the tracker cannot be reached.", int(part.degraded)
        )
        yield _counter("headrace_tracker_calls", "Calls of the tracker by the main process.", part.calls)
        for what, name, about in _DONE:
            yield _counter(name, about, self._agent.jobs.done[what])
        yield _counter("headrace_tracker_lost", "How often the tracker was given up for a time.", part.lost)


Values = float | Mapping[Any, int]


def _gauge(name: str, about: str, values: Values, *labels: str) -> Metric:
    return _filled(GaugeMetricFamily(name, about, labels=labels), values)


def _counter(name: str, about: str, values: Values, *labels: str) -> Metric:
    return _filled(CounterMetricFamily(name, about, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    if isinstance(values, Mapping):
        for labels, value in values.items():
            family.add_metric(labels, value)
    else:
        family.add_metric((), values)
    return family
