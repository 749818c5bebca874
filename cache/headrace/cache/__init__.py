"""The chunk cache: references, manifests, the store, origins and the stager.

Importing this package imports nothing heavy; `stage` and friends load what they need when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.cache.staging import StageReport, stage
    from headrace.cache.store import Store

__all__ = ["StageReport", "Store", "stage"]

_HOME = {"StageReport": "staging", "stage": "staging", "Store": "store"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"headrace.cache.{_HOME[name]}"), name)
