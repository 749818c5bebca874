"""`headrace load --rank --world --tp-plan`: what one rank needs, by a plan of one's own or transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import Command
from support.model_headers import llama_shapes
from support.safetensors_files import entry, write_sharded

SIZES = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "vocabulary": 64}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    entries = [entry(name, "BF16", shape) for name, shape in sorted(llama_shapes(**SIZES).items())]
    write_sharded(folder, {"model.safetensors": entries})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_rank_loads_its_slices_by_a_plan_in_a_file(headrace: Command, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers.*.self_attn.k_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}))
    whole = headrace("load", llama, "--json").json
    digests = set()
    for rank in (0, 3):
        part = headrace(
            "load", llama, "--rank", str(rank), "--world", "4", "--tp-plan", plan, "--digest", "--json"
        ).json
        # Four ranks have one of two key heads each, and a quarter of the columns.
        saved = 2 * 2 * (16 * 32 // 2 + 32 * 48 * 3 // 4)
        assert (part["tensors"], part["bytes"]) == (whole["tensors"], whole["bytes"] - saved)
        digests.add(part["digest"])
    assert len(digests) == 2


def test_a_rank_loads_its_slices_by_the_plan_that_transformers_has(headrace: Command, llama: Path) -> None:
    pytest.importorskip("transformers", reason="transformers has the plan")
    whole = headrace("load", llama, "--json").json["bytes"]
    norms = 2 * 5 * 32
    part = headrace("load", llama, "--rank", "1", "--world", "2", "--tp-plan", "auto", "--json").json["bytes"]
    assert part == (whole - norms) // 2 + norms


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rank", "0"], "go together"),
        (["--rank", "0", "--world", "2"], "go together"),
        (["--rank", "0", "--world", "2", "--tp-plan", "no-such-file"], "cannot be read"),
        (["--rank", "2", "--world", "2", "--tp-plan", "PLAN"], "rank 2 is not one of 0 to 1"),
        (["--rank", "0", "--world", "5", "--tp-plan", "PLAN"], "does not divide by 5 ranks"),
        (["--rank", "0", "--world", "2", "--tp-plan", "LIST"], "not a JSON object"),
        (["--rank", "0", "--world", "2", "--tp-plan", "OTHER"], "is the plan another model's"),
        (["--rank", "0", "--world", "2", "--tp-plan", "UNKNOWN"], "the style 'diagonal'"),
    ],
)
def test_shares_that_cannot_be_meant_are_refused(
    headrace: Command, llama: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    plans = {
        "PLAN": {"layers.*.mlp.down_proj": "rowwise"}, "LIST": [], "OTHER": {"blocks.*.out": "rowwise"},
        "UNKNOWN": {"lm_head": "diagonal"},
    }  # fmt: skip
    for name, plan in plans.items():
        (tmp_path / name).write_text(json.dumps(plan))
    options = [str(tmp_path / option) if option in plans else option for option in options]
    assert reason in headrace("load", llama, *options, code=2).err
