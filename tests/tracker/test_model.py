"""Redis and Valkey answer what the model in memory answers, whatever nodes say and in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from support.redis_server import RedisServer
from support.tracker_machine import TrackerMachine

# More of them: `tests/campaigns/tracker_model.py`.
EXAMPLES, STEPS = 15, 20


def test_it_answers_as_the_model_does(server: RedisServer) -> None:
    class Machine(TrackerMachine):
        url = server.url

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)
    )
