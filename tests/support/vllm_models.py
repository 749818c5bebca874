"""Small random checkpoints that vLLM runs: Llama, Qwen3 with tied embeddings, Mixtral. Needs transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

VOCABULARY = 512

_SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def write(kind: str, folder: Path, *, seed: int = 0, shard: str = "5GB") -> None:
    """Write `config.json` and safetensors in bfloat16; `shard` is the largest size of a file."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    }[kind]
    extra: dict[str, Any] = {"tie_word_embeddings": kind == "qwen3"}
    if kind == "mixtral":
        extra |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    made = model(config(**_SHAPE, **extra)).to(torch.bfloat16)
    made.save_pretrained(folder, max_shard_size=shard)
    assert json.loads((folder / "config.json").read_text())["architectures"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    for name in ("llama", "qwen3", "mixtral"):
        write(name, given.folder / name, shard="400KB")
    write("llama", given.folder / "llama-other", seed=1, shard="400KB")
    write("llama", given.folder / "llama-single", seed=2)
