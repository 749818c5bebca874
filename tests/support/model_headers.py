"""Headers of real models' shapes, without their bytes."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.cache.safetensors import DTYPE_BITS, Header, TensorInfo

SHARD = 5_000_000_000
"""Bytes of a file, as models are usually sharded."""

Shapes = dict[str, tuple[int, ...]]


def llama_shapes(
    layers: int = 80,
    hidden: int = 8192,
    intermediate: int = 28672,
    heads: int = 64,
    kv_heads: int = 8,
    vocabulary: int = 128256,
) -> Shapes:
    """Of Llama 3 70B, unless other sizes are given."""
    kv = hidden // heads * kv_heads
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"model.layers.{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"model.layers.{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"model.layers.{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"model.layers.{layer}.mlp.down_proj.weight": (hidden, intermediate),
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def headers(shapes: Shapes, dtype: str = "BF16", shard: int = SHARD) -> Iterator[Header]:
    """One for each file: the tensors by name, as many as fit."""
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, shape in sorted(shapes.items()):
        size = DTYPE_BITS[dtype] // 8
        for length in shape:
            size *= length
        if tensors and position + size > shard:
            yield _header(tensors, position)
            tensors, position = {}, 0
        tensors[name] = TensorInfo(name, dtype, shape, position, position + size)
        position += size
    yield _header(tensors, position)


def _header(tensors: dict[str, TensorInfo], size: int) -> Header:
    data_start = 8 + 120 * len(tensors)
    return Header(tensors, None, data_start, data_start + size)
