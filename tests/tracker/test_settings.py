"""What a tracker's settings accept, and how they say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.cache.errors import UsageError
from headrace.cache.tracker.settings import TrackerSettings


@pytest.mark.parametrize(
    ("url", "servers", "database", "service", "tls"),
    [
        ("redis://redis", [("redis", 6379)], 0, "", False),
        ("rediss://redis.example:6400/3", [("redis.example", 6400)], 3, "", True),
        ("redis://[::1]:7000", [("::1", 7000)], 0, "", False),
        ("redis+sentinel://a,b:26380/main", [("a", 26379), ("b", 26380)], 0, "main", False),
        ("rediss+sentinel://a:1/main/2", [("a", 1)], 2, "main", True),
    ],
)
def test_a_url_names_servers_database_and_service(
    url: str, servers: list[tuple[str, int]], database: int, service: str, tls: bool
) -> None:
    settings = TrackerSettings(url)
    assert settings.servers() == servers
    assert (settings.database(), settings.service, settings.tls) == (database, service, tls)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"url": "http://redis"}, "redis://"),
        ({"url": "redis://user:hunter2@redis"}, "password_file"),
        ({"url": "redis://:hunter2@redis"}, "password_file"),
        ({"url": "redis://a,b"}, "several servers"),
        ({"url": "redis://redis:port"}, "host:port"),
        ({"url": "redis://redis:99999"}, "host:port"),
        ({"url": "redis://"}, "host:port"),
        ({"url": "redis://redis/zero"}, "database"),
        ({"url": "redis+sentinel://a:1"}, "service"),
        ({"url": "redis://redis", "prefix": "{a}"}, "prefix"),
        ({"url": "redis://redis", "prefix": ""}, "prefix"),
        ({"url": "redis://redis", "ca": "/ca.pem"}, "rediss"),
        ({"url": "rediss://redis", "certificate": "/node.pem"}, "key"),
        ({"url": "redis://redis", "lease": 0}, "lease"),
        ({"url": "redis://redis", "lease": float("nan")}, "lease"),
        ({"url": "redis://redis", "lifetime": 15}, "lifetime"),
        ({"url": "redis://redis", "timeout": -1}, "timeout"),
        ({"url": "redis://redis", "timeout": "1"}, "timeout"),
        ({"url": "redis://redis", "pasword_file": "/f"}, "pasword_file"),
        ({"url": 6379}, "url"),
        ({}, "url"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        TrackerSettings.from_json(values)
    assert named in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_settings_travel_as_json_and_never_hold_a_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    settings = TrackerSettings("rediss://redis:1/2", user="headrace", password_file=str(file), ca="/ca.pem")
    text = json.dumps(settings.as_json())
    assert TrackerSettings.from_json(json.loads(text)) == settings
    assert settings.password({}) == "hunter2"
    assert "hunter2" not in text + repr(settings)


def test_the_password_comes_from_the_environment_where_no_file_is_named() -> None:
    settings = TrackerSettings("redis://redis")
    assert settings.password({"HEADRACE_REDIS_PASSWORD": "hunter2"}) == "hunter2"
    assert settings.password({}) is None
    assert settings.sentinel_password({"HEADRACE_SENTINEL_PASSWORD": "other"}) == "other"


@pytest.mark.parametrize("content", [None, "", "\n", b"\xff\xfe"])
def test_a_password_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "password"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=str(file)):
        TrackerSettings("redis://redis", password_file=str(file)).password({})
