"""From the format's dtypes to torch's.

torch has a dtype for all of them except F6_E2M3 and F6_E3M2 (and older versions lack some 8-bit and 4-bit
ones). F4 becomes `torch.float4_e2m1fn_x2`, which holds two elements in each byte: its last dimension is half
of the header's, as safetensors itself returns it.
"""

from __future__ import annotations

import torch

from headrace.cache.errors import LoadError
from headrace.cache.safetensors import TensorInfo

_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}
"""The dtypes this torch has, by the format's name."""


def torch_form(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """The torch dtype and shape of a tensor, or None where torch cannot express it.

    Not expressible are the 6-bit dtypes, and 4-bit tensors whose last dimension is odd.
    """
    dtype = TORCH.get(info.dtype)
    if dtype is None:
        return None
    if info.dtype != "F4":
        return dtype, info.shape
    if not info.shape or info.shape[-1] % 2:
        return None
    return dtype, (*info.shape[:-1], info.shape[-1] // 2)


def raw_or_torch_form(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """As `torch_form`; what torch cannot express becomes its bytes: uint8 of shape (bytes,)."""
    return torch_form(info) or (torch.uint8, (info.nbytes,))


def strict_torch_form(info: TensorInfo, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """As `torch_form`.

    Raises:
        LoadError: torch cannot express this tensor.
    """
    form = torch_form(info)
    if form is None:
        raise LoadError(
            f"{where}: tensor {info.name!r} is {info.dtype} of shape {list(info.shape)}, which torch "
            f"{torch.__version__} cannot express: use headrace.loader.load, which returns its bytes"
        )
    return form
