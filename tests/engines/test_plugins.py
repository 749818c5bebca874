"""What the engine plug-ins promise that needs no engine: `test_vllm` and `test_sglang` have the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.safetensors_files import entry, write_sharded

from headrace.cache.errors import HeadraceError, LoadError, MissingTensor, OriginUnavailable, UsageError
from headrace.loader import load
from headrace.loader.engines import sglang
from headrace.loader.engines.filled import WrittenBytes, parts_missing
from headrace.loader.engines.options import EngineOptions
from headrace.loader.engines.weights import Place, Weights, check_whole, is_final, reference_for, staged

INDEX = "model.safetensors.index.json"
SHARDS = {
    f"model-{shard}.safetensors": [entry(f"{shard}.{number}.weight", "BF16", (30, 70)) for number in range(4)]
    for shard in "abc"
}


def run(script: str, **environment: str) -> str:
    env = {"PYTHONPATH": ":".join(sys.path), **environment}
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_sharded(folder, SHARDS, INDEX)
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit; random bytes are sometimes not a number, which equals nothing."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def weights(model: Path, **more: Any) -> Weights:
    return Weights(Place(str(model), plain=True), EngineOptions(), **more)


# -- how engines find them ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_engines_find_the_plug_in_by_its_entry_point(engine: str) -> None:
    (found,) = [point for point in entry_points(group=engine) if point.name == "headrace"]
    assert callable(found.load())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_plug_in_imports_no_engine_and_nothing_heavy(engine: str) -> None:
    script = f"import json, sys, headrace.loader.engines.{engine}; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(run(script)))
    heavy = {"vllm", "sglang", "transformers", "obstore", "fsspec", "boto3", "aiohttp", "click", "sqlite3"}
    assert not heavy & modules


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_without_a_fitting_engine_a_plug_in_warns_and_lets_it_start(engine: str, tmp_path: Path) -> None:
    # An engine of another version: the package is there, and nothing that the plug-in needs.
    (tmp_path / engine).mkdir()
    (tmp_path / engine / "__init__.py").write_text("")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.stderr = sys.stdout\n"
        f"from headrace.loader.engines.{engine} import register; register(); register(); print('started')"
    )
    said = run(script)
    assert "load format headrace is not available" in said
    assert said.endswith("started\n")


def test_other_load_formats_stay_sglangs_own() -> None:
    asked: list[object] = []
    config = SimpleNamespace(load_format="safetensors")
    sglang.verify_load_format(asked.append, config)
    assert asked == [config]
    assert config.load_format == "safetensors"


# -- options --------------------------------------------------------------------------------------


def test_options_are_what_the_engines_user_wrote() -> None:
    assert EngineOptions.parse({}) == EngineOptions()
    given = {"reference": "s3://models/llama", "root": "/models", "max_ahead": 1 << 20, "fallback": False}
    options = EngineOptions.parse(given)
    assert (options.reference, options.max_ahead, options.fallback) == ("s3://models/llama", 1 << 20, False)


@pytest.mark.parametrize(
    "given",
    [
        "s3://models/llama",
        {"refrence": "s3://models/llama"},
        {"reference": ""},
        {"reference": 3},
        {"read_path": "fast"},
        {"verify": "sometimes"},
        {"threads": 0},
        {"threads": True},
        {"max_ahead": "1GB"},
        {"max_ahead": -1},
        {"fallback": "no"},
        {"unfilled": "ignore"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(given: object) -> None:
    with pytest.raises(UsageError):
        EngineOptions.parse(given)


# -- where weights are ----------------------------------------------------------------------------


def test_a_place_is_a_path_a_reference_or_a_repository(model: Path) -> None:
    assert Place.of(str(model), None, None) == Place(str(model), plain=True)
    assert Place.of(str(model), None, "s3://models/a") == Place("s3://models/a", plain=False)
    assert Place.of("org/name", None, None) == Place("hf://org/name", plain=False)
    assert Place.of("org/name", "v1", None) == Place("hf://org/name@v1", plain=False)
    assert Place.of("gs://models/a", "v1", None) == Place("gs://models/a", plain=False)
    assert Place.of("./not/there", None, None) == Place("./not/there", plain=False)
    with pytest.raises(HeadraceError, match="does not exist"):
        Place.of("./not/there", None, None).open(EngineOptions())


def test_a_reference_stands_for_the_model_it_was_given_for_and_for_no_other() -> None:
    reference = "s3://models/of-this-test"
    assert reference_for(None, "/models/a") is None
    assert reference_for(reference, "/models/a") == reference  # nothing is known of another one
    assert reference_for(reference, "/models/a", serve=True) == reference
    assert reference_for(reference, "/models/b") is None
    assert reference_for(reference, "/models/a") == reference


def test_another_loader_gets_a_plain_folder(model: Path, tmp_path: Path) -> None:
    options = EngineOptions(root=str(tmp_path / "store"))
    assert staged(Place(str(model), plain=True), options) == str(model)
    assert staged(Place(str(model / "model-a.safetensors"), plain=True), options) == str(model)
    folder = staged(Place(f"file://{model}", plain=False), options)
    assert load(folder).digest() == load(model).digest()


# -- the pass -------------------------------------------------------------------------------------


def test_every_tensor_is_handed_over_once_and_a_new_pass_starts_from_the_beginning(model: Path) -> None:
    expected = load(model).tensors
    one = weights(model)
    for _ in range(2):
        given = dict(one)
        assert given.keys() == one.names
        assert same(given, expected)
        assert one.bytes == sum(tensor.nbytes for tensor in expected.values())
        assert one.failure is None


def test_tensors_that_are_held_stay_as_they_are_however_small_the_ring_is(model: Path) -> None:
    expected = load(model).tensors
    given = dict(Weights(Place(str(model), plain=True), EngineOptions(max_ahead=1, read_path="buffered")))
    assert same(given, expected)


def test_what_the_engine_has_no_use_for_is_not_read(model: Path) -> None:
    given = dict(weights(model, skip=lambda name: not name.startswith("b.")))
    assert set(given) == {f"b.{number}.weight" for number in range(4)}
    assert dict(weights(model, skip=lambda name: True)) == {}


def test_the_engines_device_context_does_not_reach_the_weights(model: Path) -> None:
    with torch.device("meta"):
        given = dict(weights(model))
        assert torch.empty(1).is_meta
    assert {tensor.device.type for tensor in given.values()} == {"cpu"}


def test_a_missing_tensor_is_named_before_the_first_one_is_handed_over(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["c.9.weight"] = "model-c.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    one = weights(model)
    with pytest.raises(MissingTensor, match=r"c\.9\.weight") as caught:
        next(iter(one))
    assert one.names == set()
    assert one.failure is caught.value
    with pytest.raises(MissingTensor):
        check_whole(str(model))


def test_what_another_loader_could_read_is_told_from_what_is_wrong_with_the_checkpoint(model: Path) -> None:
    assert not is_final(LoadError("the disk failed"))
    assert not is_final(OriginUnavailable("no answer"))
    assert not is_final(RuntimeError("unforeseen"))
    assert is_final(MissingTensor("no k_proj"))
    assert is_final(KeyboardInterrupt())
    path = model / "model-b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    one = weights(model)
    with pytest.raises(HeadraceError):
        list(one)
    assert one.failure is not None
    assert is_final(one.failure)


def test_an_engine_that_fails_is_not_taken_for_a_failure_of_reading(model: Path) -> None:
    one = weights(model)
    with pytest.raises(ZeroDivisionError):
        for _ in one:
            raise ZeroDivisionError
    assert one.failure is None


# -- what reached the parameters ------------------------------------------------------------------


def test_written_bytes_tell_full_half_and_untouched_parameters_apart() -> None:
    full, half, none = (torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(3))
    with WrittenBytes() as written, torch.no_grad():
        full.copy_(torch.ones(4, 6))
        half.data.narrow(1, 0, 3).copy_(torch.ones(4, 3))
    assert [written.share(one) for one in (full, half, none)] == [1.0, 0.5, 0.0]
    assert written.share(torch.nn.Parameter(torch.empty(0))) == 1.0
    assert written.share(torch.nn.Parameter(torch.empty(3, device="meta"))) == 1.0


def test_what_a_fused_parameter_lacks_has_the_checkpoints_name() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    given = {f"model.layers.0.attn.{part}_proj.weight" for part in "qv"}
    lost = ["model.layers.0.attn.k_proj.weight"]
    assert parts_missing("model.layers.0.attn.qkv_proj.weight", packed, given) == lost
    under_a_prefix = {name.removeprefix("model.") for name in given}
    assert parts_missing("model.layers.0.attn.qkv_proj.weight", packed, under_a_prefix) == lost
    assert parts_missing("model.norm.weight", packed, given) == ["model.norm.weight"]
    whole = "model.layers.1.attn.qkv_proj.weight"
    assert parts_missing(whole, packed, given) == [whole]
