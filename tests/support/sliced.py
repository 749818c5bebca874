"""What a slice must be, by slicing the whole tensor: the definition that the loader is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.cache.safetensors import DTYPE_BITS
from headrace.loader.slices import Experts, Fused, Replicated, Shaped, Slicing, Split

Bits = NDArray[np.uint8]
"""A tensor's bytes: its shape, and one more dimension for those of an element. For elements that are not whole
bytes, single bits."""


def bits_of(dtype: str, shape: tuple[int, ...], data: bytes) -> Bits:
    width = DTYPE_BITS[dtype]
    if width % 8:
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(*shape, width)
    return np.frombuffer(data, np.uint8).reshape(*shape, width // 8)


def bytes_of(dtype: str, bits: Bits) -> bytes:
    return (
        np.packbits(bits.reshape(-1), bitorder="little").tobytes()
        if DTYPE_BITS[dtype] % 8
        else bits.tobytes()
    )


def sliced(whole: Bits, slicing: Slicing, rank: int, world: int) -> Bits:
    """This rank's slice of a tensor (of stacked experts, not of one expert's own)."""
    if isinstance(slicing, Replicated):
        return whole
    if isinstance(slicing, Experts):
        if slicing.order == "round_robin":
            return whole[rank::world]
        return np.split(whole, world)[rank]
    assert not isinstance(slicing, Shaped)
    axis = slicing.dim % (whole.ndim - 1)
    if isinstance(slicing, Split):
        return _share(whole, axis, slicing.heads, slicing.uneven, rank, world)
    assert isinstance(slicing, Fused)
    if isinstance(slicing.parts, int):
        blocks = np.split(whole, slicing.parts, axis)
        heads: list[int | None] = [None] * slicing.parts
    else:
        blocks = np.split(whole, np.cumsum([part.size for part in slicing.parts])[:-1], axis)
        heads = [part.heads for part in slicing.parts]
    shares = [_share(block, axis, own, False, rank, world) for block, own in zip(blocks, heads, strict=True)]
    return np.concatenate(shares, axis)


def _share(whole: Bits, axis: int, heads: int | None, uneven: bool, rank: int, world: int) -> Bits:
    if uneven:
        each = -(-whole.shape[axis] // world)
        return whole.take(
            range(min(rank * each, whole.shape[axis]), min((rank + 1) * each, whole.shape[axis])), axis
        )
    if heads is not None and heads < world:
        return np.split(whole, heads, axis)[rank // (world // heads)]
    return np.split(whole, world, axis)[rank]
