"""Ctrl-C and SIGTERM: the first stops cleanly, the second at once.

Python runs handlers in the main thread, between two of its steps. A signal that comes just before the
main thread begins to wait, or while it is in native code, is not seen until that is over. So a thread
of its own, which the interpreter tells of every signal as it comes, sees to both promises.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from types import FrameType

from headrace.cache.errors import Interrupted

_ASK = (signal.SIGINT, signal.SIGTERM)
_NUDGE_FIRST, _NUDGE_MOST = 0.01, 1.0


class Asked(KeyboardInterrupt):
    """What the first signal raises.

    A plain KeyboardInterrupt that leaves an `exec`, as it may while modules are imported, makes `python -m`
    end itself by SIGINT, whatever exit code was asked for meanwhile.
    """


class _Stop:
    """Raises `Asked` in the main thread the first time, ends the process the second."""

    def __init__(self) -> None:
        self._noticed = False
        self._come, self._told = os.pipe()
        os.set_blocking(self._told, False)

    def install(self) -> None:
        for number in _ASK:
            signal.signal(number, self._notice)
        # Does nothing but end the wait of the main thread, which then looks for signals. By default it is
        # ignored, and nothing that is sent from outside.
        signal.signal(signal.SIGURG, lambda number, frame: None)
        signal.set_wakeup_fd(self._told)
        threading.Thread(target=self._watch, name="headrace-interrupts", daemon=True).start()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if not self._noticed:
            self._noticed = True
            raise Asked

    def _watch(self) -> None:
        asked, pause = 0, _NUDGE_FIRST
        main = threading.main_thread().ident
        assert main is not None
        while True:
            unnoticed = asked > 0 and not self._noticed
            if select.select([self._come], [], [], pause if unnoticed else None)[0]:
                asked += sum(number in _ASK for number in os.read(self._come, 64))
            elif unnoticed:
                signal.pthread_kill(main, signal.SIGURG)
                pause = min(pause * 2, _NUDGE_MOST)
            if asked > 1:
                # Claims are kernel locks: they end with the process, and what is marked is right.
                os._exit(Interrupted.exit_code)


def install() -> None:
    """Handle both signals from now on; called once, by the main thread."""
    _Stop().install()
