"""Loading a model and staging it to its end, as `load` and `demo` do; stops cleanly on Ctrl-C."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headrace.cache.errors import Interrupted, MissingDependency, UsageError
from headrace.cache.progress import Progress
from headrace.cache.staging import open_for_loading

if TYPE_CHECKING:
    from headrace.cache.staging import StageReport, StagingJob
    from headrace.loader import Loaded, LoadStats


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was loaded, and what was staged for it: None where the source is a plain folder or file.

    Attributes:
        stats: as `Loaded.stats`, but from before the reference was resolved.
    """

    loaded: Loaded
    stats: LoadStats
    staged: StageReport | None


@dataclass(frozen=True, slots=True)
class Share:
    """One rank of several loads its slices.

    Attributes:
        rank, world: which, 0 to world - 1.
        tp_plan: style by name, as in transformers; None: transformers' own for the model.
    """

    rank: int
    world: int
    tp_plan: Mapping[str, str] | None


def share_of(rank: int | None, world: int | None, tp_plan: str | None) -> Share | None:
    """From the options; None if none is given.

    Raises:
        UsageError: only some are given, or the file of `tp_plan` cannot be read.
    """
    if rank is None and world is None and tp_plan is None:
        return None
    if rank is None or world is None or tp_plan is None:
        raise UsageError("--rank, --world and --tp-plan go together: give all three, or none.")
    if tp_plan == "auto":
        return Share(rank, world, None)
    try:
        with open(tp_plan, encoding="utf-8") as file:
            plan = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tensor-parallel plan {tp_plan} cannot be read: {error}.") from error
    if not isinstance(plan, dict):
        raise UsageError(f"the tensor-parallel plan {tp_plan} is not a JSON object of names and styles.")
    return Share(rank, world, plan)


def load_model(
    source: str,
    *,
    root: str | None,
    domain: str | None,
    progress: Progress,
    device: str = "cpu",
    names: Sequence[str] = (),
    patterns: Sequence[str] = (),
    read_path: str = "auto",
    verify: str = "auto",
    share: Share | None = None,
    begin: Callable[[], StagingJob] | None = None,
) -> Outcome:
    """Load a model, then wait until all of it is staged.

    Args:
        begin: makes the job that stages it; None: one of this process.

    Raises:
        HeadraceError: as `headrace.loader.load`; Interrupted after Ctrl-C, when nothing runs any more.
    """
    begun = time.perf_counter()
    opened: Any = None
    try:
        if os.path.exists(source) or ":" not in source:
            loader = _loader()
            begun = time.perf_counter()
            opened = loader.open_source(source)
        else:
            _check_torch()
            # Staging starts first: importing torch takes seconds in which chunks arrive.
            opened = open_for_loading(source, root=root, domain=domain, progress=progress, begin=begin)
            loader = _loader()
        slices = None if share is None else _slices(opened, share)
        opening = time.perf_counter() - begun
        loaded = loader.load(
            opened,
            device,
            names=names or None,
            patterns=patterns or None,
            read_path=read_path,
            slices=slices,
            verify=verify,
        )
        # The tensors are there; the snapshot is complete only when the rest of it is, too.
        job = getattr(opened, "job", None)
        staged = None if job is None else job.wait()
    except BaseException as error:
        if (job := getattr(opened, "job", None)) is not None:
            job.cancel()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted; what arrived is kept, and the next run resumes.") from None
        raise
    finally:
        if opened is not None:
            opened.close()
    return Outcome(loaded, _with_opening(loaded.stats, opening), staged)


def _with_opening(stats: LoadStats, opening: float) -> LoadStats:
    """The same load, counted from before its source was opened; that time is part of `resolve`.

    For a reference it includes the import of torch, which runs while the first chunks arrive.
    """
    spans = [
        replace(span, start=0.0, seconds=span.seconds + opening)
        if span.name == "resolve"
        else replace(span, start=span.start + opening)
        for span in stats.trace
    ]
    return replace(stats, seconds=stats.seconds + opening, trace=tuple(spans))


def _slices(source: Any, share: Share) -> Any:
    tp_plan = importlib.import_module("headrace.loader.tp_plan")
    return tp_plan.slices_of_source(source, share.rank, share.world, plan=share.tp_plan)


def _loader() -> Any:
    _check_torch()
    return importlib.import_module("headrace.loader")


def _check_torch() -> None:
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            "loading needs the library torch, which is not installed: pip install 'headrace[torch]'."
        )
