"""Metrics and health: what is exposed is what the page says, and counts what happened."""

from __future__ import annotations

import http.client
import os
import re
import signal
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.agents import RunningAgent
from support.command import Command, wait_until
from support.faulty_server import FaultyServer
from support.mounts import needs
from support.ports import free
from support.redis_server import RedisServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scraped(port: int) -> dict[str, Metric]:
    """Metrics by name, without the series that a histogram makes of itself."""
    status, text = get(port, "/metrics")
    assert status == 200
    return {m.name: m for m in text_string_to_metric_families(text) if not m.name.endswith("_created")}


def value(metrics: dict[str, Metric], name: str, **labels: str) -> float:
    (found,) = [
        sample.value
        for sample in metrics[name].samples
        if sample.labels == labels and not sample.name.endswith("_created")
    ]
    return found


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> (type, labels) of the page's tables."""
    rows = re.findall(r"^\| `(headrace_\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_metrics_are_those_of_the_page_and_count_what_happened(
    headrace: Command, tmp_path: Path, model: Path, files: dict[str, bytes]
) -> None:
    (port,) = free(1)
    agent = RunningAgent(headrace, tmp_path / "agent", {"agent": {"metrics": f"127.0.0.1:{port}"}})
    with agent:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (200, "ok\n")
        assert get(port, "/elsewhere")[0] == 404
        through = agent.commands()
        through("stage", model)
        through("stage", model)
        through("stage", tmp_path / "none", code=11)
        metrics = scraped(port)
        size = sum(map(len, files.values()))
        assert value(metrics, "headrace_fetched_bytes", source="origin") == size
        assert value(metrics, "headrace_fetched_bytes", source="peer") == 0
        assert value(metrics, "headrace_present_bytes") == size
        assert value(metrics, "headrace_cache_hits") == 1
        assert value(metrics, "headrace_cache_misses") == 1
        assert value(metrics, "headrace_jobs_ended", outcome="staged") == 2
        assert value(metrics, "headrace_jobs_ended", outcome="failed") == 1
        assert value(metrics, "headrace_store_free_bytes") > 0
        counts = [s for s in metrics["headrace_staging_seconds"].samples if s.name.endswith("_count")]
        assert {s.labels["class"]: s.value for s in counts} == {"demand": 2, "prestage": 0}
        found = {
            metric.name + ("_total" if metric.type == "counter" else ""): (
                metric.type,
                {label for sample in metric.samples for label in sample.labels} - {"le"},
            )
            for metric in metrics.values()
        }
        assert found == documented()


@needs("redis-server")
def test_what_staging_processes_do_at_the_tracker_is_counted_also_when_they_die(
    headrace: Command, tmp_path: Path, slow: FaultyServer
) -> None:
    (port,) = free(1)
    with RedisServer(tmp_path / "redis") as redis:
        settings = {
            "agent": {"metrics": f"127.0.0.1:{port}"},
            "peers": {"listen": "127.0.0.1:0"},
            "tracker": {"url": redis.url},
        }
        with RunningAgent(headrace, tmp_path / "agent", settings) as agent:

            def counted(name: str) -> float:
                return value(scraped(port), f"headrace_{name}")

            assert counted("claims") == counted("tracker_worker_calls") == 0
            stage = ("stage", f"{slow.url}/m/", "--chunk-size", str(64 * 1024), "--json")
            with agent.commands().start(*stage) as client:
                wait_until(lambda: counted("claims") > 0)
                (staging,) = agent.children()
                os.kill(staging, signal.SIGKILL)
                wait_until(lambda: bool(agent.client.ask("GET", "/v1/jobs")["jobs"][0]["restarts"]))
                claims, calls = counted("claims"), counted("tracker_worker_calls")
                assert claims > 0
                assert calls > 0
                slow.pace = None
                _, err = client.communicate(timeout=60)
            assert client.returncode == 0, err
            assert counted("claims") > claims
            assert counted("tracker_worker_calls") > calls
