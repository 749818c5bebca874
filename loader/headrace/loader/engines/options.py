"""What an engine's user may say about headrace: the keys of `--model-loader-extra-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from headrace.cache.errors import UsageError
from headrace.loader.choose import ReadPath, check_read_path
from headrace.loader.verify import VerifyMode, check_verify

Unfilled = Literal["refuse", "warn"]

MAX_AHEAD = 256 * 1024 * 1024
"""Bytes of complete tensors that wait for the engine, at most; memory comes in pieces of about as much."""

_KINDS: dict[str, tuple[type, str]] = {
    "reference": (str, "a text"),
    "root": (str, "a text"),
    "domain": (str, "a text"),
    "read_path": (str, "a text"),
    "verify": (str, "a text"),
    "threads": (int, "a whole number"),
    "max_ahead": (int, "a whole number of bytes"),
    "fallback": (bool, "true or false"),
    "unfilled": (str, "a text"),
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine plug-in.

    Attributes:
        reference: a model reference or a path to take the weights from; the engine's own model argument
            then only serves configuration and tokenizer. None: the weights too come from there.
        root, domain: the store and the trust domain, where a reference is staged.
        read_path: as for `load`. None: "auto"; where several ranks read the same files, one that goes
            through the page cache, so that the disk is read once.
        verify: bytes against their digests: "auto", "always", "boot" or "never", as for `load`.
        threads: that read, as for `load`.
        max_ahead: bytes of complete tensors that may wait for the engine.
        fallback: let the engine's own loader do it when this one fails.
        unfilled: what to do when parameters of the model got nothing from the checkpoint: "refuse" or "warn".
    """

    reference: str | None = None
    root: str | None = None
    domain: str | None = None
    read_path: ReadPath | None = None
    verify: VerifyMode = "auto"
    threads: int | None = None
    max_ahead: int = MAX_AHEAD
    fallback: bool = True
    unfilled: Unfilled = "refuse"

    @classmethod
    def parse(cls, given: Any) -> EngineOptions:
        """From what the engine passes on.

        Raises:
            UsageError: not a mapping, an unknown key, or a value that cannot be meant.
        """
        if not isinstance(given, Mapping):
            raise UsageError(
                f"the extra configuration of load format headrace must be an object with keys, not {given!r}"
            )
        unknown = sorted(set(given) - set(_KINDS))
        if unknown:
            raise UsageError(
                f"load format headrace has no option {', '.join(unknown)}: known are {', '.join(sorted(_KINDS))}"
            )
        for key, value in given.items():
            kind, what = _KINDS[key]
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UsageError(f"option {key} of load format headrace must be {what}, not {value!r}")
        options = cls(**given)
        if options.read_path is not None:
            check_read_path(options.read_path)
        check_verify(options.verify)
        if options.unfilled not in get_args(Unfilled):
            raise UsageError(f"option unfilled must be refuse or warn, not {options.unfilled!r}")
        if options.max_ahead <= 0 or (options.threads is not None and options.threads <= 0):
            raise UsageError("options max_ahead and threads of load format headrace must be positive")
        if options.reference == "":
            raise UsageError(
                "option reference of load format headrace is empty: leave it out or name a model"
            )
        return options
