"""Synthetic sharded checkpoints in bf16, of any size, written fast."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20


def layer(hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of one decoder layer: large projections and small norms."""
    yield "input_layernorm.weight", (hidden,)
    for name in ("q", "o"):
        yield f"self_attn.{name}_proj.weight", (hidden, hidden)
    for name in ("k", "v"):
        yield f"self_attn.{name}_proj.weight", (hidden // 4, hidden)
    for name in ("gate", "up", "down"):
        yield f"mlp.{name}_proj.weight", (hidden * 7 // 2, hidden)
    yield "post_attention_layernorm.weight", (hidden,)


def write_model(folder: Path, size: int, *, shards: int = 4, hidden: int = 2048, seed: int = 1) -> int:
    """Write about `size` bytes in `shards` safetensors files with an index; returns the exact size.

    Every 1 MiB of the content is different.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block = bytearray(random.Random(seed).randbytes(_BLOCK))
    written, number, block_number, weights = 0, 0, 0, {}
    for shard in range(shards):
        tensors: list[tuple[str, tuple[int, ...], int]] = []
        total = 0
        while total < size // shards:
            for name, shape in layer(hidden):
                length = 2
                for dimension in shape:
                    length *= dimension
                tensors.append((f"model.layers.{number}.{name}", shape, length))
                total += length
            number += 1
        header: dict[str, object] = {}
        offset = 0
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        for tensor, shape, length in tensors:
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + length]}
            weights[tensor] = name
            offset += length
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            left = offset
            while left:
                struct.pack_into("<QQ", block, 0, seed, block_number)
                left -= file.write(memoryview(block)[:left])
                block_number += 1
            written += file.tell()
    index = json.dumps({"metadata": {"total_size": written}, "weight_map": weights}).encode()
    (folder / "model.safetensors.index.json").write_bytes(index)
    (folder / "config.json").write_bytes(b'{"architectures": ["Synthetic"]}')
    return written


def write_small(folder: Path, count: int, *, seed: int = 1) -> int:
    """Write one file of `count` bf16 tensors of 16 to 64 KiB; returns its size."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    header: dict[str, object] = {}
    offset = 0
    for number in range(count):
        rows = draw.randint(16, 64)
        name = f"model.layers.{number // 50}.experts.{number % 50}.weight"
        header[name] = {"dtype": "BF16", "shape": [rows, 512], "data_offsets": [offset, offset + rows * 1024]}
        offset += rows * 1024
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    block = draw.randbytes(_BLOCK)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        left = offset
        while left:
            left -= file.write(memoryview(block)[:left])
        return file.tell()
