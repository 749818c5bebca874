"""Revisions of one model: tensors of a transformer's sizes, of which some change, move or are added.

Every byte is random, seeded by the tensor's name and version, so that nothing is equal by accident.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A bf16 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 2
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision; `versions` says which seed a tensor's bytes come from, 0 where nothing is said."""

    tensors: tuple[Tensor, ...]
    versions: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    shards: int = 1

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first tensor, over all shards."""
        return sum(8 + len(self._header(shard)) for shard in self._divided())

    def write(self, folder: Path) -> None:
        """Write the shards and an index, as libraries order them: by name."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = self._divided()
        weight_map = {}
        for number, part in enumerate(parts, 1):
            name = (
                "model.safetensors"
                if len(parts) == 1
                else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            )
            head = self._header(part)
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(head)) + head)
                for tensor in part:
                    weight_map[tensor.name] = name
                    source = random.Random(f"{tensor.name}:{self.versions.get(tensor.name, 0)}")
                    for start in range(0, tensor.nbytes, _BLOCK):
                        file.write(source.randbytes(min(_BLOCK, tensor.nbytes - start)))
        if len(parts) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _divided(self) -> list[list[Tensor]]:
        limit = -(-self.size // self.shards)
        parts: list[list[Tensor]] = [[]]
        filled = 0
        for tensor in sorted(self.tensors, key=lambda t: t.name):
            if filled and filled + tensor.nbytes > limit and len(parts) < self.shards:
                parts.append([])
                filled = 0
            parts[-1].append(tensor)
            filled += tensor.nbytes
        return parts

    def _header(self, tensors: list[Tensor]) -> bytes:
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        position = 0
        for tensor in tensors:
            end = position + tensor.nbytes
            entries[tensor.name] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        head = json.dumps(entries, separators=(",", ":")).encode()
        return head + b" " * (-(8 + len(head)) % 8)


def transformer(*, hidden: int, inner: int, vocab: int, layers: int) -> Revision:
    """Twelve tensors a layer, from norms and biases to projections, and one embedding."""
    tensors = [Tensor("model.embed_tokens.weight", (vocab, hidden)), Tensor("model.norm.weight", (hidden,))]
    narrow = hidden // 7
    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, inner),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "self_attn.k_proj.bias": (narrow,),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.v_proj.bias": (narrow,),
            "self_attn.v_proj.weight": (narrow, hidden),
        }
        tensors += [Tensor(f"model.layers.{layer}.{name}", shape) for name, shape in shapes.items()]
    return Revision(tuple(tensors))


def changed(base: Revision, fraction: float, seed: int) -> tuple[Revision, int]:
    """A revision in which random tensors, together about `fraction` of the bytes, are new; how many bytes."""
    budget = fraction * base.size
    chosen: dict[str, int] = {}
    total = 0
    for tensor in random.Random(seed).sample(base.tensors, len(base.tensors)):
        if total >= 0.95 * budget:
            break
        if total + tensor.nbytes <= 1.05 * budget:
            chosen[tensor.name] = seed + 1
            total += tensor.nbytes
    return replace(base, versions={**base.versions, **chosen}), total


def longer_header(base: Revision) -> tuple[Revision, int]:
    """The same tensors behind a header that grew by some hundred bytes; how many bytes are new."""
    revision = replace(base, metadata={**base.metadata, "notes": "x" * 777})
    return revision, revision.header_bytes


def added(base: Revision, tensor: Tensor) -> tuple[Revision, int]:
    """One more tensor, in the middle of the file by its name; how many bytes are new."""
    revision = replace(base, tensors=(*base.tensors, tensor))
    return revision, revision.header_bytes + tensor.nbytes


def resharded(base: Revision, shards: int) -> Revision:
    """The same tensors in another number of files."""
    return replace(base, shards=shards)
