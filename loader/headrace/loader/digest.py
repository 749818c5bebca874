"""The tensors digest: one number for what a model's tensors are, however they are laid out in files.

xxh3-128 over all tensors sorted by name, for each: name (UTF-8), NUL, the format's dtype name, NUL, shape as
decimal numbers joined by commas, NUL, the tensor's bytes as the format stores them (little-endian, row by
row). It tells whether two loads agree; it is no protection against someone who wants them to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash

from headrace.cache.safetensors import TensorInfo
from headrace.loader.memory import as_bytes


def tensors_digest(tensors: Mapping[str, torch.Tensor], infos: Mapping[str, TensorInfo]) -> str:
    """The digest, 32 hexadecimal digits.

    Args:
        tensors: by name, on any device; those that torch cannot express as their bytes.
        infos: of the same names: dtype and shape as in the headers.
    """
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        info = infos[name]
        shape = ",".join(map(str, info.shape))
        state.update(f"{name}\0{info.dtype}\0{shape}\0".encode())
        tensor = tensors[name]
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            state.update(as_bytes(flat))
    return state.hexdigest()
