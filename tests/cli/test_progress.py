"""Progress: live on a terminal, plain lines elsewhere, never on standard output."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios

import pytest
from support.command import Command
from support.faulty_server import FaultyServer
from support.models import below

from headrace.cache.progress import Progress
from headrace.cli import display
from headrace.cli.display import Rate
from headrace.cli.invocation import Invocation

CALL = Invocation(root=None, domain=None, as_json=False, quiet=False)


def on_terminal(headrace: Command, *args: str) -> tuple[str, str]:
    """Run with standard error on a terminal of 100 columns; standard output, and what the terminal got."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    headrace.environ["TERM"] = "xterm-256color"
    process = headrace.start(*args, stdin=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    try:
        while part := os.read(main, 65536):
            seen += part
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(main)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, seen.decode()
    return out, seen.decode()


def test_a_terminal_shows_bytes_rate_time_left_sources_and_connections(
    headrace: Command, files: dict[str, bytes]
) -> None:
    with FaultyServer(below("m", files), rate=1.5e6) as server:
        out, seen = on_terminal(
            headrace, "stage", f"{server.url}/m/", "--chunk-size", "64KiB", "--json", "--workers", "1"
        )
    assert json.loads(out)["snapshots"]
    assert "\x1b[" in seen  # drawn over and over in place
    assert re.search(r"staging +\d+%, [\d.]+ [kM]B of 2\.\d+ MB", seen)
    assert re.search(r"[\d.]+ [kM]?B/s, [\d.]+ s left", seen)
    assert re.search(r"origin [\d.]+ [kM]B", seen)
    assert re.search(r"connections \d", seen)


def test_without_a_terminal_there_are_plain_lines(headrace: Command, files: dict[str, bytes]) -> None:
    with FaultyServer(below("m", files)) as server:
        result = headrace("stage", f"{server.url}/m/", "--json")
    lines = result.err.splitlines()
    assert all(line.startswith("headrace: ") for line in lines)
    assert "\x1b" not in result.err
    assert re.search(r"staged, 2\.\d+ MB of 2\.\d+ MB in .*; origin 2\.\d+ MB", lines[-1])
    assert result.json


def test_plain_lines_come_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    progress = Progress(total=1000, phase="staging", connections=3)
    with display.displayed(CALL, "a model", progress):
        progress.add("origin", 400)
        progress.note("something to know")
        lines = ""
        while "40%" not in lines or "something to know" not in lines:
            lines += capsys.readouterr().err
        progress.add("peer", 600)
        progress.phase = "staged"
    lines += capsys.readouterr().err
    assert re.search(r"a model: staging +40%, 400 B of 1 kB; .*; origin 400 B, connections 3", lines)
    assert "a model: staged, 1 kB of 1 kB" in lines
    assert "origin 400 B, peer 600 B" in lines
    assert lines.count("something to know") == 1


def test_a_run_that_fails_is_not_said_to_have_ended_well(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=1000, phase="staging")
    with pytest.raises(ZeroDivisionError), display.displayed(CALL, "a model", progress):
        raise ZeroDivisionError
    assert "a model: stopped, 0 B of 1 kB" in capsys.readouterr().err


def test_quiet_is_quiet(headrace: Command, files: dict[str, bytes]) -> None:
    with FaultyServer(below("m", files)) as server:
        assert headrace("stage", f"{server.url}/m/", "--quiet").err == ""
        out, seen = on_terminal(headrace, "stage", f"{server.url}/m/", "--quiet")
    assert out
    assert seen == ""


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate(window=2.0)
    assert rate.add(0.0, 0) == 0.0
    assert rate.add(1.0, 100) == 100.0
    for second in range(2, 10):
        last = rate.add(float(second), 100 + 1000 * (second - 1))
    assert last == 1000.0
