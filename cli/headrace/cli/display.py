"""Progress on standard error: a live display on a terminal, a plain line now and then elsewhere.

A display only looks at the `Progress` that the working threads count in; it never slows them down.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from headrace.cache.progress import Progress
from headrace.cli.invocation import Invocation, to_stderr
from headrace.cli.units import show_seconds, show_size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_SECONDS = 5.0
"""Between two plain lines."""
_WINDOW = 4.0  # seconds over which the rate is taken
_LIVE_PER_SECOND = 8
_STAGING = ("resolving", "staging", "completing", "staged")  # other work has no "here already"


class Rate:
    """Bytes per second over the last few seconds, fed with (seconds, bytes done so far)."""

    def __init__(self, window: float = _WINDOW) -> None:
        self._window = window
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> float:
        """Take a sample; the rate, 0.0 while there is nothing to compare with."""
        self._seen.append((now, done))
        while now - self._seen[0][0] > self._window and len(self._seen) > 2:
            self._seen.popleft()
        (then, before), (last, after) = self._seen[0], self._seen[-1]
        return max(0.0, (after - before) / (last - then)) if last > then else 0.0


class _Facts:
    """What both displays show, as text."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name = name
        self.progress = progress
        self._rate = Rate()
        self._speed = 0.0
        self._notes = 0

    def sample(self) -> None:
        # What was there before, and is found on the way to this phase, would show as an absurd speed.
        if self.progress.phase != "resolving":
            self._speed = self._rate.add(time.monotonic(), self.progress.done)

    def new_notes(self) -> list[str]:
        new = self.progress.notes[self._notes :]
        self._notes += len(new)
        return new

    @property
    def fraction(self) -> float:
        return self.progress.done / self.progress.total if self.progress.total else 0.0

    def amounts(self) -> str:
        progress = self.progress
        if not progress.total:
            return progress.phase
        return f"{progress.phase} {self.fraction:4.0%}, {show_size(progress.done)} of {show_size(progress.total)}"

    def pace(self) -> str:
        parts = [f"{show_size(self._speed)}/s"]
        if self._speed > 0:
            left = (self.progress.total - self.progress.done) / self._speed
            parts.append(f"{show_seconds(left)} left")
        return ", ".join(parts)

    def line(self) -> str:
        """One plain line of what is going on."""
        parts = [self.amounts(), self.pace() if self.progress.total else "", self.sources()]
        return f"headrace: {self.name}: {'; '.join(p for p in parts if p)}"

    def last_line(self, outcome: str) -> str:
        """One plain line of how it ended."""
        progress = self.progress
        done = (
            f"{show_size(progress.done)} of {show_size(progress.total)} in {show_seconds(progress.seconds)}"
        )
        parts = [f"{outcome}, {done}", self.sources(connections=False)]
        return f"headrace: {self.name}: {'; '.join(p for p in parts if p)}"

    def sources(self, *, connections: bool = True) -> str:
        fetched = self.progress.fetched
        parts = [f"{source} {show_size(size)}" for source, size in fetched.items() if size]
        present = self.progress.done - sum(fetched.values())
        if present > 0 and self.progress.phase in _STAGING:
            parts.append(f"here already {show_size(present)}")
        if connections and self.progress.connections:
            parts.append(f"connections {self.progress.connections}")
        return ", ".join(parts)


@contextlib.contextmanager
def displayed(call: Invocation, name: str, progress: Progress) -> Iterator[None]:
    """Show `progress` while the block runs; its last notes are shown at the end."""
    if call.quiet:
        yield
        return
    facts = _Facts(name, progress)
    live = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    with _live(facts) if live else _plain(facts):
        yield
    for note in facts.new_notes():
        call.say(note)


@contextlib.contextmanager
def _plain(facts: _Facts) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        due = time.monotonic() + PLAIN_SECONDS
        while not ended.wait(0.25):
            facts.sample()
            for note in facts.new_notes():
                to_stderr(f"headrace: {note}")
            if time.monotonic() >= due:
                due += PLAIN_SECONDS
                to_stderr(facts.line())

    to_stderr(f"headrace: {facts.name}: {facts.progress.phase}")
    thread = threading.Thread(target=run, name="headrace-progress", daemon=True)
    thread.start()
    outcome = "stopped"
    try:
        yield
        outcome = facts.progress.phase
    finally:
        ended.set()
        thread.join()
        if facts.progress.total:
            to_stderr(facts.last_line(outcome))


@contextlib.contextmanager
def _live(facts: _Facts) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(
        get_renderable=lambda: _picture(facts, console),
        console=console,
        refresh_per_second=_LIVE_PER_SECOND,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield


def _picture(facts: _Facts, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    facts.sample()
    width = min(60, max(20, console.width - 2))
    filled = int(width * facts.fraction)
    return Group(
        Text(facts.name, style="bold", overflow="ellipsis", no_wrap=True),
        Text.assemble(("━" * filled, "green"), ("━" * (width - filled), "dim")),
        Text(f"{facts.amounts()}, {facts.pace()}", no_wrap=True, overflow="ellipsis"),
        Text(facts.sources(), style="dim", no_wrap=True, overflow="ellipsis"),
    )
