"""Which parameters of a model were really written while it was loaded.

An index tells which tensors a checkpoint should have; a checkpoint of a single file has none, and an engine
that gets no `k_proj` runs with what happened to be in that third of its fused parameter. So the bytes that are
copied into each parameter are counted while the engine loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WrittenBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Within this context: how many bytes were copied into each storage. A byte written twice counts twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._bytes: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0].device.type != "meta":
            self._bytes[args[0].untyped_storage().data_ptr()] += args[0].nbytes
        return result

    def share(self, tensor: torch.Tensor) -> float:
        """The part of a tensor that was written, at most 1; 1 for one without bytes of its own."""
        if tensor.device.type == "meta" or not tensor.nbytes:
            return 1.0
        return min(1.0, self._bytes[tensor.untyped_storage().data_ptr()] / tensor.nbytes)


def parts_missing(parameter: str, packed: Mapping[str, list[str]], given: set[str]) -> list[str]:
    """The checkpoint's names for what a fused parameter did not get, as far as they can be told.

    Args:
        parameter: the engine's name, e.g. "model.layers.0.self_attn.qkv_proj.weight".
        packed: the engine's fused modules, e.g. {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        given: the checkpoint's tensors.
    """
    for fused, parts in packed.items():
        before, found, after = parameter.rpartition(f".{fused}.")
        if not found:
            continue
        names = [f"{before}.{part}.{after}" for part in parts]
        # The engine's prefix of a model may differ from the checkpoint's.
        missing = [name for name in names if not any(n == name or name.endswith("." + n) for n in given)]
        if missing and len(missing) < len(names):
            return missing
    return [parameter]
