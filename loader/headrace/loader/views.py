"""Tensors as views of an image.

Neighbours that differ in their first dimension at most are one strided view of the image, which is then cut: for
20,000 small tensors that takes half the time of a strided view for each. Where a tensor lies at an address that its
element size does not divide, a view is impossible and its bytes are copied, once they are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from headrace.cache.safetensors import TensorInfo
from headrace.loader.dtypes import raw_or_torch_form

Item = tuple[TensorInfo, int]
"""A tensor and its byte offset in the image."""


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """What tensors have in common that can be one view.

    Attributes:
        typed: the image as their dtype; None where it begins at an address that does not allow that.
        tail: their shape without the first dimension; None for scalars, which have none.
        strides: of all dimensions, in elements.
    """

    typed: torch.Tensor | None
    width: int  # bytes of an element
    tail: tuple[int, ...] | None
    strides: tuple[int, ...]

    def cut(self, begin: int, rows: list[int]) -> Sequence[torch.Tensor | None]:
        """Tensors of so many rows each, one after another from byte `begin` of the image."""
        if self.typed is None or begin % self.width:
            return [None] * len(rows)
        first = int(self.typed.storage_offset()) + begin // self.width
        if self.tail is None:
            return [self.typed.as_strided((), (), first)]
        whole = self.typed.as_strided((sum(rows), *self.tail), self.strides, first)
        # "Unsafe": for autograd the parts are tensors of their own, which may be changed in place.
        return torch.unsafe_split_with_sizes(whole, rows)


def make_views(image: torch.Tensor, items: Iterable[Item]) -> list[torch.Tensor | None]:
    """One tensor for each item, in order; None for those that must be copied (see `copied`).

    Args:
        image: uint8, one-dimensional.
        items: within the image; none is empty.
    """
    result: list[torch.Tensor | None] = []
    kinds: dict[tuple[torch.dtype, tuple[int, ...] | None], _Kind] = {}
    forms: dict[tuple[str, tuple[int, ...]], tuple[_Kind, int, int]] = {}
    rows: list[int] = []  # of the neighbours of one kind
    last: _Kind | None = None
    begin = end = 0
    for info, offset in items:
        form = forms.get(info[1:3])
        if form is None:
            dtype, shape = raw_or_torch_form(info)
            tail = shape[1:] if shape else None
            if (dtype, tail) not in kinds:
                kinds[dtype, tail] = _Kind(_typed(image, dtype), dtype.itemsize, tail, _strides(shape))
            form = forms[info[1:3]] = kinds[dtype, tail], shape[0] if shape else 1, info.nbytes
        kind, count, size = form
        if kind is not last or offset != end or kind.tail is None:
            if last is not None:
                result += last.cut(begin, rows)
            last, begin, end, rows = kind, offset, offset, []
        rows.append(count)
        end += size
    if last is not None:
        result += last.cut(begin, rows)
    return result


def copied(image: torch.Tensor, item: Item) -> torch.Tensor:
    """A tensor of its own with the bytes of `item`."""
    info, offset = item
    return shaped(image[offset : offset + info.nbytes].clone(), info)


def shaped(raw: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """A tensor of memory that has its bytes and nothing else."""
    dtype, shape = raw_or_torch_form(info)
    return raw.view(dtype).view(shape)


def empty(info: TensorInfo) -> torch.Tensor:
    """A tensor without elements."""
    dtype, shape = raw_or_torch_form(info)
    return torch.empty(shape, dtype=dtype)


def _typed(image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    width = dtype.itemsize
    if image.data_ptr() % width or image.storage_offset() % width:
        return None
    return image[: image.numel() // width * width].view(dtype)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
