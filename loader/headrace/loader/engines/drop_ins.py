"""`patched_safetensors`: libraries that read safetensors files by themselves read them through headrace.

accelerate, diffusers and others call `safetensors.safe_open` and `safetensors.torch.load_file`, and many bind
these names when they are imported. Inside the context both packages' names, and those bound in the modules
listed here, stand for `headrace.loader.safe_open` and `load_file`; outside nothing is changed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from headrace.cache.errors import MissingDependency
from headrace.loader.drop_in import load_file, safe_open

_TORCH = ("pt", "torch", "pytorch")
_MODULES = (
    "safetensors",
    "safetensors.torch",
    "accelerate.utils.modeling",
    "accelerate.utils.offload",
    "diffusers.loaders.ip_adapter",
    "diffusers.loaders.textual_inversion",
    "peft.utils.save_and_load",
    "transformers.modeling_utils",
)
_OPENERS = ("safe_open",)
_LOADERS = ("load_file", "safe_load_file")


class _Exchange:
    """The names as they are exchanged; contexts that overlap share one exchange, the last one undoes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts = 0
        self._changed: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        try:
            package, torch_part = (
                importlib.import_module(name) for name in ("safetensors", "safetensors.torch")
            )
        except ModuleNotFoundError as error:
            raise MissingDependency("safetensors is not installed: pip install safetensors") from error
        with self._lock:
            self._contexts += 1
            if self._contexts == 1:
                theirs = package.safe_open
                self._exchange(_OPENERS, theirs, _opener(theirs))
                self._exchange(_LOADERS, torch_part.load_file, load_file)

    def leave(self) -> None:
        with self._lock:
            self._contexts -= 1
            while not self._contexts and self._changed:
                setattr(*self._changed.pop())

    def _exchange(self, names: tuple[str, ...], theirs: Any, ours: Any) -> None:
        for module in [sys.modules[name] for name in _MODULES if name in sys.modules]:
            for name in names:
                if vars(module).get(name) is theirs:
                    self._changed.append((module, name, theirs))
                    setattr(module, name, ours)


_exchange = _Exchange()


def _opener(theirs: Any) -> Any:
    def safe_open_for_any_framework(
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device = "cpu",
        **options: Any,
    ) -> Any:
        chosen = safe_open if framework in _TORCH else theirs
        return chosen(filename, framework, device, **options)

    return safe_open_for_any_framework


@contextlib.contextmanager
def patched_safetensors() -> Iterator[None]:
    """Within the context, safetensors files of torch tensors are read through headrace, in every thread.

    Only names in modules that are imported already are exchanged: import what you use before. Files that
    headrace is not for (another framework than torch) are read by safetensors itself.

    Raises:
        MissingDependency: safetensors is not installed.
    """
    _exchange.enter()
    try:
        yield
    finally:
        _exchange.leave()
