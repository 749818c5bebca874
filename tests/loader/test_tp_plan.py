"""Slicing rules from transformers' tensor-parallel plans; compared with what transformers itself loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.filling_source import FillingSource
from support.safetensors_files import entry, write_sharded

from headrace.cache.errors import MissingDependency, UsageError
from headrace.cache.safetensors import TensorInfo
from headrace.loader import DirectorySource, Rule, SlicePlan, Split
from headrace.loader.tp_plan import STYLES, slices_from_tp_plan, slices_from_transformers, slices_of_source

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 128,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    ),
    "mixtral": lambda: mixtral(),
    "mixtral-ep": lambda: mixtral(),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2, head_dim=8
        )
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
}


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def test_ranks_load_what_transformers_loads_tensor_parallel(tmp_path: Path) -> None:
    torch.manual_seed(7)
    for name, make in MODELS.items():
        make().save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "support.tensor_parallel_rank"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    folders = [str(tmp_path / name) for name in MODELS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "meeting"), *folders],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=250) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    for output, _ in answers:
        results = [json.loads(line) for line in output.splitlines()]
        assert [result["folder"] for result in results] == folders
        for result in results:
            assert result["different"] == []
            assert 10 <= result["sharded"] < result["compared"]


def shape(plan: SlicePlan, name: str, *size: int) -> tuple[int, ...] | None:
    count = 1
    for length in size:
        count *= length
    one = plan.cut(TensorInfo(name, "U8", size, 0, count))
    return None if one is None else one.info.shape


@pytest.mark.parametrize(
    ("style", "vector", "matrix", "stack", "bias"),
    [
        ("colwise", (4,), (4, 8), (8, 4, 8), (4,)),
        ("colwise_rep", (4,), (4, 8), (8, 4, 8), (4,)),
        ("colwise_gather_output", (4,), (4, 8), (8, 4, 8), (4,)),
        ("local_colwise", (4,), (4, 8), (8, 4, 8), (4,)),
        ("rowwise", (4,), (8, 4), (8, 8, 4), (8,)),
        ("rowwise_rep", (4,), (8, 4), (8, 8, 4), (8,)),
        ("rowwise_split_input", (4,), (8, 4), (8, 8, 4), (8,)),
        ("packed_colwise", (4,), (4, 8), (8, 4, 8), (4,)),
        ("packed_rowwise", (8,), (8, 4), (8, 8, 4), (8,)),
        ("local_packed_rowwise", (8,), (8, 4), (8, 8, 4), (8,)),
        ("embedding_rowwise", (4,), (4, 8), (4, 8, 8), (4,)),
        ("grouped_gemm", (4,), (4, 8), (4, 8, 8), (4,)),
        ("replicate", (8,), (8, 8), (8, 8, 8), (8,)),
        ("moe_tp_experts", (8,), (8, 8), (8, 8, 8), (8,)),
    ],
)
def test_a_style_slices_parameters_as_in_transformers(
    style: str,
    vector: tuple[int, ...],
    matrix: tuple[int, ...],
    stack: tuple[int, ...],
    bias: tuple[int, ...],
) -> None:
    plan = slices_from_tp_plan({"layers.*.w": style}, 1, 2)
    for name in ("layers.3.w", "model.layers.12.w.weight", "a.b.layers.0.w.scale"):
        assert shape(plan, name, 8) == vector
        assert shape(plan, name, 8, 8) == matrix
        assert shape(plan, name, 8, 8, 8) == stack
    assert shape(plan, "layers.3.w.bias", 8) == bias
    for name in ("layers.x.w", "layers.3.w.inner.weight", "layers.3.4.w", "mylayers.3.w", "layers.3.w2"):
        assert shape(plan, name, 8, 8) == (8, 8)


def test_a_single_number_is_never_sliced() -> None:
    plan = slices_from_tp_plan({"w": "colwise", "v": "rowwise"}, 0, 2)
    assert shape(plan, "w.scale") == shape(plan, "v.scale") == ()


def test_every_style_is_understood_and_others_are_refused_by_name() -> None:
    for style in STYLES:
        slices_from_tp_plan({"w": style}, 0, 2)
    with pytest.raises(
        UsageError, match=r"gives 'layers\.\*\.w' the style 'diagonal', which is none of colwise"
    ):
        slices_from_tp_plan({"layers.*.w": "diagonal"}, 0, 2)


def test_all_styles_of_the_installed_transformers_are_understood() -> None:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    assert set(ALL_PARALLEL_STYLES.keys()) <= set(STYLES)


def test_an_exact_name_goes_before_its_module_and_own_rules_go_before_both() -> None:
    tp_plan = {"w": "colwise", "w.scale": "replicate"}
    plan = slices_from_tp_plan(tp_plan, 0, 2, before=[Rule("*.zero_point", Split(1))])
    assert shape(plan, "m.w.weight", 8, 8) == (4, 8)
    assert shape(plan, "m.w.scale", 8, 8) == (8, 8)
    assert shape(plan, "m.w.zero_point", 8, 8) == (8, 4)


def test_key_and_value_heads_fewer_than_ranks_are_replicated() -> None:
    tp_plan = {"layers.*.self_attn.k_proj": "colwise", "layers.*.self_attn.q_proj": "colwise"}
    plan = slices_from_tp_plan(tp_plan, 3, 8, kv_heads=2)
    assert shape(plan, "layers.0.self_attn.k_proj.weight", 16, 5) == (8, 5)
    assert shape(plan, "layers.0.self_attn.q_proj.weight", 16, 5) == (2, 5)
    alone = slices_from_tp_plan(tp_plan, 3, 8)
    assert shape(alone, "layers.0.self_attn.k_proj.weight", 16, 5) == (2, 5)


def test_what_does_not_divide_is_refused_unless_allowed() -> None:
    tp_plan = {"lm_head": "colwise_gather_output"}
    with pytest.raises(UsageError, match="9 does not divide by 2 ranks"):
        shape(slices_from_tp_plan(tp_plan, 0, 2), "lm_head.weight", 9, 4)
    for rank, rows in ((0, 5), (1, 4)):
        assert shape(slices_from_tp_plan(tp_plan, rank, 2, uneven=True), "lm_head.weight", 9, 4) == (rows, 4)


def test_experts_with_tensors_of_their_own_follow_the_plan_of_stacked_ones() -> None:
    tensor = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
    }
    plan = slices_from_tp_plan(tensor, 1, 2)
    assert shape(plan, "model.layers.0.mlp.experts.gate_up_proj", 4, 8, 6) == (4, 4, 6)
    assert shape(plan, "model.layers.0.mlp.experts.3.gate_proj.weight", 8, 6) == (4, 6)
    assert shape(plan, "model.layers.0.block_sparse_moe.experts.3.w3.weight", 8, 6) == (4, 6)
    assert shape(plan, "model.layers.0.block_sparse_moe.experts.3.w2.weight", 8, 6) == (8, 3)
    assert shape(plan, "model.layers.0.mlp.experts.3.down_proj.bias", 8) == (8,)
    whole = slices_from_tp_plan(dict.fromkeys(tensor, "grouped_gemm"), 1, 2, experts=4)
    assert shape(whole, "model.layers.0.mlp.experts.down_proj", 4, 8, 6) == (2, 8, 6)
    assert shape(whole, "model.layers.0.mlp.experts.1.down_proj.weight", 8, 6) is None
    assert shape(whole, "model.layers.0.block_sparse_moe.experts.2.w1.weight", 8, 6) == (8, 6)


def test_the_plan_of_a_model_and_of_its_configuration_slice_alike() -> None:
    with torch.device("meta"):
        model = MODELS["llama"]()
    model.config.architectures = ["LlamaForCausalLM"]
    by_model = slices_from_transformers(model, 1, 4)
    by_configuration = slices_from_transformers(model.config, 1, 4)
    sliced = 0
    for name, parameter in model.named_parameters():
        assert shape(by_model, name, *parameter.shape) == shape(by_configuration, name, *parameter.shape)
        sliced += shape(by_model, name, *parameter.shape) != tuple(parameter.shape)
    assert sliced == 2 * (7 + 5) + 2  # weights, biases of what is split by rows, embedding and head


def source_of(folder: Path, config: str | None) -> DirectorySource:
    write_sharded(folder, {"model.safetensors": [entry("a", "U8", (4,))]})
    if config is not None:
        (folder / "config.json").write_text(config)
    return DirectorySource(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "does not say what model it is"),
        ("{}", "does not say what model it is"),
        ('{"model_type": "no-such-model"}', "does not know 'no-such-model'"),
        ('{"model_type": ["llama"]}', "does not say what model it is"),
        ('{"model_type": "bert"}', "no tensor-parallel plan for 'bert'"),
    ],
)
def test_a_source_without_a_known_plan_is_refused(config: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        slices_of_source(source_of(tmp_path, config), 0, 2)


def test_heads_and_experts_are_taken_from_a_configuration_that_is_still_being_staged(tmp_path: Path) -> None:
    config = {"text_config": {"num_key_value_heads": 2, "num_experts": 8}}
    tp_plan = {"layers.*.self_attn.k_proj": "colwise", "layers.*.mlp.experts.down_proj": "grouped_gemm"}
    with FillingSource(tmp_path / "source", {"config.json": json.dumps(config).encode()}, 16) as source:
        thread = source.stage_in_background(source.all_chunks()[::-1])
        try:
            plan = slices_of_source(source, 1, 4, plan=tp_plan)
        finally:
            thread.join()
    assert shape(plan, "layers.0.self_attn.k_proj.weight", 16, 5) == (8, 5)
    assert shape(plan, "layers.0.mlp.experts.2.down_proj.weight", 4, 4) == (4, 4)
    assert shape(plan, "layers.0.mlp.experts.1.down_proj.weight", 4, 4) is None


@pytest.mark.parametrize("config", [None, "[]", "{}", '{"text_config": 5, "num_key_value_heads": "two"}'])
def test_a_plan_of_ones_own_needs_no_configuration(config: str | None, tmp_path: Path) -> None:
    plan = slices_of_source(source_of(tmp_path, config), 1, 4, plan={"k_proj": "colwise"})
    assert shape(plan, "k_proj.weight", 16, 5) == (4, 5)


def test_without_transformers_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match="pip install transformers, or give the plan"):
        slices_of_source(source_of(tmp_path, '{"model_type": "llama"}'), 0, 2)
