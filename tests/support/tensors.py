"""Tensors as plain bytes, for comparisons."""

from __future__ import annotations

import torch

from headrace.loader.memory import as_bytes


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, in the order of its elements."""
    return bytes(as_bytes(tensor.contiguous().view(-1).view(torch.uint8))) if tensor.numel() else b""
