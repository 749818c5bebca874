"""Ctrl-C and SIGTERM: the first stops cleanly, the second at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

from headrace.cache.errors import Interrupted


class _Stop:
    """Raises KeyboardInterrupt the first time, ends the process the second."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            # Claims are kernel locks: they end with the process, and what is marked is right.
            os._exit(Interrupted.exit_code)
        self._asked = True
        raise KeyboardInterrupt


def install() -> None:
    """Handle both signals from now on; called once, by the main thread."""
    stop = _Stop()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
