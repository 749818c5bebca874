"""Origins: where the authoritative bytes are.

`open_origin` finds the adapter for a reference's scheme and wraps it in patience. The adapters, and
with them obstore and fsspec, are imported when the first reference of their kind is opened.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from headrace.cache.errors import MissingDependency
from headrace.cache.origins.options import OriginOptions
from headrace.cache.origins.protocol import Listing, Origin, OriginFile, Pin
from headrace.cache.origins.retry import Counters, RetryingOrigin
from headrace.cache.reference import Reference, unknown_scheme

__all__ = [
    "Counters",
    "Listing",
    "Origin",
    "OriginFile",
    "OriginOptions",
    "Pin",
    "RetryingOrigin",
    "open_origin",
]


class Factory(Protocol):
    """What every adapter module has as `open`."""

    def __call__(self, reference: Reference, options: OriginOptions) -> Origin: ...


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Where an adapter is, and the extra of this distribution that brings its libraries."""

    module: str
    extra: str


_OBSTORE = _Adapter("obstore", "cache")
_FSSPEC = _Adapter("fsspec", "cache")
ADAPTERS: Mapping[str, _Adapter] = {
    "s3": _OBSTORE,
    "gs": _OBSTORE,
    "az": _OBSTORE,
    "http": _OBSTORE,
    "https": _OBSTORE,
    "oss": _Adapter("oss", "oss"),
    "hf": _Adapter("hub", "hf"),
    "file": _Adapter("local", "cache"),
}


def open_origin(reference: Reference, options: OriginOptions | None = None) -> RetryingOrigin:
    """The origin of `reference`; nothing is asked of it yet.

    Args:
        reference: what to read.
        options: None takes them from the environment.

    Raises:
        UsageError: nothing serves this scheme.
        MissingDependency: the library for it is not installed.
    """
    if options is None:
        options = OriginOptions.from_env(reference.scheme)
    adapter = ADAPTERS.get(reference.scheme) or _by_fsspec(reference.scheme)
    try:
        module = importlib.import_module(f"headrace.cache.origins.{adapter.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("headrace."):
            raise
        raise MissingDependency(
            f"{reference.scheme}:// needs the library {error.name}, which is not installed: "
            f"pip install 'headrace[{adapter.extra}]'."
        ) from error
    factory: Factory = module.open
    return RetryingOrigin(factory(reference, options), options)


def _by_fsspec(scheme: str) -> _Adapter:
    """fsspec's adapter, if fsspec knows the scheme.

    Without fsspec nothing can be said about schemes that only it may know, so a typo is the likelier
    cause and gets the suggestion.
    """
    if importlib.util.find_spec("fsspec") is None:
        raise unknown_scheme(scheme)
    registry = importlib.import_module("fsspec")
    if scheme not in registry.available_protocols():
        raise unknown_scheme(scheme)
    return _FSSPEC
