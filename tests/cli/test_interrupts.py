"""Ctrl-C and SIGTERM: staging stops at once, and the next run goes on where it was."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Command, wait_until
from support.faulty_server import Fault, FaultyServer
from support.models import below
from support.stores import read_files

from headrace.cache.inventory import entry
from headrace.cache.store import Store

CHUNK = 64 * 1024


@pytest.fixture
def slow(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    """Takes about 3 s for the model."""
    with FaultyServer(below("m", files), rate=1e6) as server:
        yield server


def present(root: Path) -> int:
    """Bytes that a half-filled store has."""
    if not (root / "format").exists():
        return 0
    with Store.open(root, writable=False) as store:
        domain = store.domain()
        return sum(entry(domain, snapshot).present for snapshot in domain.snapshots())


def stage(server: FaultyServer, *more: str) -> tuple[str, ...]:
    return ("stage", f"{server.url}/m/", "--chunk-size", str(CHUNK), "--connections", "4", *more)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_the_next_one_resumes(
    headrace: Command, slow: FaultyServer, files: dict[str, bytes], signum: signal.Signals
) -> None:
    stopped = headrace.interrupted_when(
        lambda: present(headrace.root) > 500_000, *stage(slow, "--json"), signum=signum
    )
    assert stopped.code == 130
    assert stopped.json["error"]["exit_code"] == 130
    assert "next run resumes" in stopped.err
    assert "Traceback" not in stopped.err
    kept = present(headrace.root)
    assert 500_000 < kept < sum(map(len, files.values()))
    slow.pace = None
    resumed = headrace(*stage(slow, "--json")).json["snapshots"][0]
    assert sum(resumed["sources"].values()) == resumed["bytes"] - kept
    assert read_files(Path(resumed["path"])) == {p: d for p, d in files.items() if p != "pytorch_model.bin"}


def test_an_interrupted_load_stops_staging_too(headrace: Command, slow: FaultyServer) -> None:
    stopped = headrace.interrupted_when(
        lambda: present(headrace.root) > 0, "load", f"{slow.url}/m/", "--json"
    )
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert stopped.json["error"]["kind"] == "Interrupted"


# Programs that, once interrupted, never come to their end by themselves.
IN_PYTHON = """
import threading
from headrace.cli import interrupts
interrupts.install()
try:
    print("ready", flush=True)
    threading.Event().wait()
except KeyboardInterrupt:
    print("first", flush=True)
    threading.Event().wait()
"""
# Native code that waits for a lock that it has: signals do not end that, and no handler of Python runs.
IN_NATIVE_CODE = """
import ctypes
from headrace.cli import interrupts
interrupts.install()
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
try:
    print("ready", flush=True)
    lock(mutex)
except KeyboardInterrupt:  # it came before the wait
    lock(mutex)
"""


def test_a_second_ctrl_c_ends_the_process_whatever_it_waits_for() -> None:
    with subprocess.Popen([sys.executable, "-c", IN_PYTHON], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_in_native_code(second: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IN_NATIVE_CODE], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        # Two of a kind would become one in the kernel.
        wait_until(lambda: not pending(process.pid, signal.SIGINT))
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(60) == 130


def test_an_interrupt_while_modules_are_imported_has_its_exit_code(tmp_path: Path) -> None:
    """Many modules make classes with `exec`. With -m, as everything here is run."""
    (tmp_path / "importing.py").write_text(
        "import sys, threading\n"
        "from headrace.cli import interrupts\n"
        "interrupts.install()\n"
        "try: exec('print(\"ready\", flush=True); threading.Event().wait()')\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "importing"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to a process and has not reached it yet."""
    lines = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return any(int(lines[name], 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def test_ctrl_c_at_a_terminal_ends_worker_processes_without_noise(
    headrace: Command, slow: FaultyServer
) -> None:
    main, terminal = pty.openpty()
    process = headrace.start(*stage(slow, "--workers", "3", "--quiet"), stdin=terminal, stderr=terminal)
    os.close(terminal)
    wait_until(lambda: present(headrace.root) > 300_000 or process.poll() is not None)
    group = os.getpgid(process.pid)
    os.killpg(group, signal.SIGINT)  # as the terminal does: to every process of the group
    process.communicate(timeout=60)
    said = read_all(main)
    assert process.returncode == 130
    assert "Traceback" not in said
    wait_until(lambda: not alive(group))


def test_an_origin_that_stalls_does_not_delay_the_stop(headrace: Command, files: dict[str, bytes]) -> None:
    faults = [Fault("stall", path="*.safetensors", after=1000, seconds=600)]
    with FaultyServer(below("m", files), faults=faults) as server:
        stopped = headrace.interrupted_when((headrace.root / "format").exists, *stage(server))
    assert stopped.code == 130
    assert "next run resumes" in stopped.err


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def read_all(fd: int) -> str:
    """What was written to a terminal whose other end is closed."""
    found = b""
    try:
        while part := os.read(fd, 65536):
            found += part
    except OSError:  # EIO: that is how Linux says that the other end is closed
        pass
    finally:
        os.close(fd)
    return found.decode()
