"""What holds for every test: properties are checked for what they say, never for how long they take, and
processes that tests start can be interrupted, also where the suite itself runs in the background."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headrace")

# A background job of a shell without job control ignores SIGINT, and so would all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
