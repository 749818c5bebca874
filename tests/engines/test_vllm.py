"""vLLM for real, on the CPU: `make test-vllm` runs this in vLLM's own environment.

Every comparison is with what vLLM generates when its own loader reads the same files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.faulty_server import FaultyServer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not in this environment: `make test-vllm` has its own",
    ),
    pytest.mark.timeout(500),
]

# More than one: vLLM 0.32 on a processor with AMX dies (SIGILL) where a single short prompt is its first work.
PROMPTS = [[5, 6, 7, 8], [100, 200, 300], [17] * 9]
KINDS = ("llama", "qwen3", "mixtral")
RATE = 400_000  # bytes per second: the models have about a megabyte

Job = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def engine_process(**environment: str) -> Iterator[Job]:
    """A child with vLLM in it; call it with a job."""
    tests = Path(__file__).parent.parent
    env = os.environ | {
        "PYTHONPATH": str(tests),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        **environment,
    }
    command = [sys.executable, str(tests / "support" / "vllm_child.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdin is not None and child.stdout is not None

        def job(model: Path, load_format: str = "headrace", **more: Any) -> dict[str, Any]:
            given = {"model": str(model), "load_format": load_format, "prompts": PROMPTS, **more}
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(given) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            assert answer, "the process with vLLM died"
            result: dict[str, Any] = json.loads(answer)
            return result

        try:
            yield job
        finally:
            child.stdin.close()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()


@pytest.fixture(scope="module")
def engine() -> Iterator[Job]:
    with engine_process() as job:
        yield job


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Job]:
    with engine_process(VLLM_CPU_OMP_THREADS_BIND="0|1") as job:
        yield job


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-m", "support.vllm_models", str(folder)], check=True, env=env)
    return folder


@pytest.fixture(scope="module")
def expected(engine: Job, models: Path) -> dict[str, Any]:
    """What vLLM generates with its own loader."""
    names = (*KINDS, "llama-other", "llama-single")
    return {name: engine(models / name, "safetensors")["tokens"][0] for name in names}


@pytest.fixture(scope="module")
def expected_of_two(two_ranks: Job, models: Path) -> dict[str, Any]:
    """The same on two ranks, which add up in another order."""
    return {
        name: two_ranks(models / name, "safetensors", tensor_parallel_size=2)["tokens"][0]
        for name in ("llama", "mixtral")
    }


@pytest.fixture
def served(models: Path) -> Iterator[FaultyServer]:
    with FaultyServer(directory=models, rate=RATE) as server:
        yield server


def without_weights(model: Path, target: Path) -> Path:
    """Configuration only: what a pod needs beside a reference."""
    target.mkdir()
    shutil.copy(model / "config.json", target)
    return target


def rewritten(file: Path, drop: str) -> None:
    """Take one tensor out of a safetensors file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kept, new = b"", {}
    for name, info in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
        if name == "__metadata__":
            new[name] = info
        elif name != drop:
            start, stop = info["data_offsets"]
            new[name] = info | {"data_offsets": [len(kept), len(kept) + stop - start]}
            kept += data[start:stop]
    assert drop in header
    text = json.dumps(new).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + kept)


def shard_of(model: Path, name: str) -> Path:
    weight_map: dict[str, str] = json.loads((model / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    return model / weight_map[name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_gives_the_tokens_of_vllms_own_loader(
    engine: Job, models: Path, expected: dict[str, Any], kind: str
) -> None:
    answer = engine(models / kind)
    assert answer["tokens"] == [expected[kind]]
    assert not answer["warnings"]


def test_models_differ_so_that_equal_tokens_mean_something(expected: dict[str, Any]) -> None:
    assert len({json.dumps(tokens) for tokens in expected.values()}) == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_is_being_staged_gives_the_same_tokens(
    engine: Job, models: Path, expected: dict[str, Any], served: FaultyServer, tmp_path: Path, kind: str
) -> None:
    model = without_weights(models / kind, tmp_path / "model")
    extra = {"reference": f"{served.url}/{kind}", "root": str(tmp_path / "store")}
    answer = engine(model, extra=extra)
    assert answer["tokens"] == [expected[kind]]
    assert answer["early"] > 0
    again = engine(model, extra=extra)
    assert (again["tokens"], again["early"]) == ([expected[kind]], 0)


def test_a_stream_directory_takes_its_weights_from_where_it_says(
    engine: Job, models: Path, expected: dict[str, Any], served: FaultyServer, tmp_path: Path
) -> None:
    delivered, store = tmp_path / "model", tmp_path / "store"
    reference = f"{served.url}/llama"
    command = [
        "-m",
        "headrace.cli.main",
        "stage",
        "--stream",
        "--root",
        str(store),
        reference,
        str(delivered),
    ]
    subprocess.run([sys.executable, *command], check=True)
    assert not list(delivered.glob("*.safetensors"))
    answer = engine(delivered)
    assert answer["tokens"] == [expected["llama"]]
    assert answer["early"] > 0


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_ranks_give_the_tokens_of_vllms_own_loader(
    two_ranks: Job, models: Path, expected_of_two: dict[str, Any], kind: str
) -> None:
    assert two_ranks(models / kind, tensor_parallel_size=2)["tokens"] == [expected_of_two[kind]]


def test_two_ranks_stage_a_reference_together(
    two_ranks: Job, models: Path, expected_of_two: dict[str, Any], served: FaultyServer, tmp_path: Path
) -> None:
    model = without_weights(models / "llama", tmp_path / "model")
    extra = {"reference": f"{served.url}/llama", "root": str(tmp_path / "store")}
    answer = two_ranks(model, extra=extra, tensor_parallel_size=2)
    assert answer["tokens"] == [expected_of_two["llama"]]
    for shard in (models / "llama").glob("*.safetensors"):
        sent = sum(request.sent for request in served.log if request.path == f"llama/{shard.name}")
        assert sent < 1.5 * shard.stat().st_size


def test_a_tensor_that_the_index_names_and_no_file_has_is_refused_by_name(
    engine: Job, models: Path, tmp_path: Path
) -> None:
    lost = "model.layers.1.self_attn.k_proj.weight"
    model = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    rewritten(shard_of(model, lost), lost)
    assert "tokens" in engine(model, "safetensors")  # vLLM itself runs it, with whatever its memory held
    answer = engine(model)
    assert answer["error"] == "MissingTensor", answer
    assert lost in answer["message"]


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_tensor_that_the_model_consists_of_is_missed_without_an_index_too(
    engine: Job, models: Path, tmp_path: Path, lost: str
) -> None:
    model = Path(shutil.copytree(models / "llama-single", tmp_path / "model"))
    rewritten(model / "model.safetensors", lost)
    answer = engine(model)
    assert answer["error"] == "MissingTensor", answer
    assert lost in answer["message"]


def test_an_expert_that_is_missing_is_refused(engine: Job, models: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models / "mixtral", tmp_path / "model"))
    names = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    lost = next(name for name in sorted(names) if ".experts." in name)
    rewritten(shard_of(model, lost), lost)
    answer = engine(model)
    assert answer["error"] == "MissingTensor", answer
    assert lost in answer["message"]


def test_reading_that_fails_midway_falls_back_to_the_whole_model(
    engine: Job, models: Path, expected: dict[str, Any]
) -> None:
    answer = engine(models / "llama", extra={"read_path": "buffered", "threads": 1}, break_after=2)
    assert answer["tokens"] == [expected["llama"]]
    assert any("starts from the beginning" in line for line in answer["warnings"])


def test_reading_a_reference_that_fails_midway_falls_back_to_what_was_staged(
    engine: Job, models: Path, expected: dict[str, Any], served: FaultyServer, tmp_path: Path
) -> None:
    model = without_weights(models / "llama", tmp_path / "model")
    extra = {
        "reference": f"{served.url}/llama", "root": str(tmp_path / "store"), "read_path": "buffered", "threads": 1,
    }  # fmt: skip
    answer = engine(model, extra=extra, break_after=2)
    assert answer["tokens"] == [expected["llama"]]
    assert any("starts from the beginning" in line for line in answer["warnings"])


def test_without_the_fallback_the_failure_is_the_answer(engine: Job, models: Path) -> None:
    extra = {"read_path": "buffered", "threads": 1, "fallback": False}
    answer = engine(models / "llama", extra=extra, break_after=2)
    assert answer["error"] == "LoadError"
    assert "cannot be read" in answer["message"]


def test_a_fallback_does_not_make_a_damaged_checkpoint_run(engine: Job, models: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    model = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    (shard := shard_of(model, lost)).write_bytes(shard.read_bytes()[:-100])
    answer = engine(model)
    assert answer["error"] == "CheckpointError"
    assert shard.name in answer["message"]


def test_a_reload_takes_the_new_weights_and_comes_back_to_the_old(
    engine: Job, models: Path, expected: dict[str, Any], served: FaultyServer, tmp_path: Path
) -> None:
    other, first = models / "llama-other", models / "llama"
    answer = engine(first, reload=[None, str(other), str(first)])
    assert answer["tokens"] == [expected[name] for name in ("llama", "llama", "llama-other", "llama")]

    model = without_weights(first, tmp_path / "model")
    extra = {"reference": f"{served.url}/llama", "root": str(tmp_path / "store")}
    answer = engine(model, extra=extra, reload=[None, f"{served.url}/llama-other"])
    assert answer["tokens"] == [expected[name] for name in ("llama", "llama", "llama-other")]


def test_a_reload_is_refused_before_anything_is_touched(engine: Job, models: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.self_attn.q_proj.weight"
    model = Path(shutil.copytree(models / "llama", tmp_path / "model"))
    rewritten(shard_of(model, lost), lost)
    answer = engine(models / "llama", reload=[str(model)])
    assert answer["error"] == "MissingTensor", answer
    assert lost in answer["message"]


def test_an_option_that_does_not_exist_is_refused_by_name(engine: Job, models: Path) -> None:
    answer = engine(models / "llama", extra={"max_ahaed": 1})
    assert answer["error"] == "UsageError"
    assert "max_ahaed" in answer["message"]
