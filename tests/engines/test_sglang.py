"""SGLang's own code as far as it runs without a GPU: plug-in, `LoadConfig`, loaders. `make test-vllm` runs this.

What is not run: `load_model` with one of SGLang's models, whose kernels need CUDA.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.safetensors_files import entry, write_sharded

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None,
        reason="SGLang is not in this environment: `make test-vllm` has it",
    ),
    pytest.mark.timeout(500),
]

SHARDS = {
    f"model-{shard}.safetensors": [entry(f"{shard}.{number}.weight", "BF16", (30, 70)) for number in range(4)]
    for shard in "abc"
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sglang")
    write_sharded(folder / "model", SHARDS, "model.safetensors.index.json")
    (folder / "model" / "config.json").write_text("{}")
    tests = Path(__file__).parent.parent
    command = [sys.executable, str(tests / "support" / "sglang_child.py")]
    command += [str(folder / "model"), f"file://{folder / 'model'}", str(folder / "store")]
    env = os.environ | {"PYTHONPATH": str(tests), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_name_becomes_our_loader_and_a_choice_of_the_command_line(seen: dict[str, Any]) -> None:
    assert seen["loader"] == "headrace.loader.engines.sglang_loader.HeadraceModelLoader"
    assert seen["choices"] == 1


def test_other_formats_and_unknown_ones_are_sglangs_own_affair(seen: dict[str, Any]) -> None:
    assert seen["others"]
    assert "no-such-format" in seen["unknown"]


def test_the_loader_is_a_default_loader_with_the_same_signatures(seen: dict[str, Any]) -> None:
    assert seen["is_default"]  # what updates weights from disk asks for one
    assert all(seen["same_parameters"].values())


@pytest.mark.parametrize("where", ["directory", "reference"])
def test_its_iterator_gives_every_tensor_of_the_checkpoint(seen: dict[str, Any], where: str) -> None:
    expected = {one.name: hashlib.sha256(one.data).hexdigest() for shard in SHARDS.values() for one in shard}
    assert seen[where] == expected


def test_an_option_that_does_not_exist_is_refused_by_name(seen: dict[str, Any]) -> None:
    assert seen["option"].startswith("UsageError: ")
    assert "treads" in seen["option"]
