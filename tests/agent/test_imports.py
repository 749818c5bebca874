"""What the agent's main process carries, as it is there all the time: nothing that only staging needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STAGING = {
    "torch",
    "numpy",
    "obstore",
    "boto3",
    "botocore",
    "fsspec",
    "blake3",
    "rich",
    "safetensors",
    "redis",
}


def imported(statement: str) -> set[str]:
    script = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    return {name.partition(".")[0] for name in json.loads(answer.stdout)}


def test_the_main_process_imports_nothing_that_only_staging_needs() -> None:
    found = imported("import headrace.cli.agent, headrace.prefetch.agent")
    assert not STAGING & found
    assert {"aiohttp", "prometheus_client"} <= found


@pytest.mark.parametrize("module", ["headrace.prefetch.client", "headrace.prefetch.remote"])
def test_clients_of_the_agent_need_the_standard_library_only(module: str) -> None:
    assert not ({"aiohttp", "prometheus_client"} | STAGING) & imported(f"import {module}")


def test_a_staging_process_carries_no_server() -> None:
    assert not {"aiohttp", "prometheus_client", "torch"} & imported(
        "import headrace.prefetch.staging_process"
    )
