"""What agent, clients and staging processes say to each other, as JSON and back.

Whoever reads takes what it knows and ignores the rest, so that neighbouring versions understand each
other; only a request for something unknown is refused, as doing less than was asked would be worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from headrace.cache.errors import HeadraceError, UsageError
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import COUNTS, SOURCES, Progress
from headrace.cache.selection import Skipped
from headrace.cache.snapshot import Selection
from headrace.cache.stager import StagerLimits
from headrace.cache.staging import StageReport

SAME_ORIGIN = ("endpoint", "region", "anonymous", "requester_pays", "virtual_hosted", "profile")
"""Options of an origin that decide which bytes a reference means, and who asks for them."""
_REQUEST = tuple(f.name for f in fields(StageRequest) if f.name not in ("root", "options"))
_KINDS: Mapping[str, tuple[type, ...]] = {
    "reference": (str,),
    "domain": (str, type(None)),
    "selection": (dict,),
    "revalidate": (str, type(None)),
    "require": (str, type(None)),
    "keys": (list,),
    "workers": (int, type(None)),
    "chunk": (int,),
    "algorithm": (str,),
    "limits": (dict,),
    "name": (str, type(None)),
}


class UnknownRequest(Exception):
    """A request asks for something that this version does not have."""


def request_to_json(request: StageRequest) -> dict[str, Any]:
    """A request without its store and its origin's options: both are the agent's own."""
    values = asdict(request)
    return {name: values[name] for name in _REQUEST}


def request_from_json(values: Any, root: str) -> StageRequest:
    """The same for the store at `root`.

    Raises:
        UsageError: a value cannot be meant.
        UnknownRequest: a key that this version does not know.
    """
    if not isinstance(values, dict) or "reference" not in values:
        raise UsageError("a staging request has to be an object with a reference.")
    if unknown := sorted(set(values) - set(_REQUEST)):
        raise UnknownRequest(f"this agent knows no {unknown[0]!r} in a staging request")
    for name, value in values.items():
        if name in _KINDS and (not isinstance(value, _KINDS[name]) or isinstance(value, bool)):
            raise UsageError(f"{name!r} in a staging request cannot be {value!r}.")
    given = dict(values)
    selection = given.pop("selection", {})
    limits = given.pop("limits", {})
    given["keys"] = tuple(_texts(given.get("keys", ()), "keys"))
    chosen = Selection(
        tuple(_texts(selection.get("include", ()), "include")),
        tuple(_texts(selection.get("ignore", ()), "ignore")),
    )
    known = {f.name for f in fields(StagerLimits)}
    if unknown := sorted(set(limits) - known):
        raise UnknownRequest(f"this agent knows no limit {unknown[0]!r}")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in limits.values()):
        raise UsageError("the limits of a staging request have to be whole numbers.")
    return StageRequest(root=root, selection=chosen, limits=StagerLimits(**limits), **given)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise UsageError(f"{name!r} in a staging request has to be a list of texts.")
    return list(values)


def progress_to_json(progress: Progress) -> dict[str, Any]:
    return {
        "total": progress.total,
        "present": progress.present,
        "fetched": dict(progress.fetched),
        "chunks": progress.chunks,
        "phase": progress.phase,
        "connections": progress.connections,
        "seconds": progress.seconds,
        "notes": list(progress.notes),
        "counts": dict(progress.counts),
    }


class Counted:
    """Brings what another process counts into a `Progress` here, also when a second one goes on where the
    first one ended: what the first fetched is what the second finds present."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._fetched = dict.fromkeys(SOURCES, 0)
        self._chunks = 0
        self._counts = dict.fromkeys(COUNTS, 0)

    def next_process(self) -> None:
        """Another process takes over."""
        self._fetched = dict(self._progress.fetched)
        self._chunks = self._progress.chunks
        self._counts = dict(self._progress.counts)

    def take(self, values: Mapping[str, Any]) -> None:
        """What `progress_to_json` wrote there."""
        progress = self._progress
        fetched = values.get("fetched", {})
        progress.total = values.get("total", 0)
        progress.present = values.get("present", 0) - sum(self._fetched.values())
        for source in progress.fetched:
            progress.fetched[source] = self._fetched.get(source, 0) + fetched.get(source, 0)
        progress.chunks = self._chunks + values.get("chunks", 0)
        counts = values.get("counts", {})
        for what in progress.counts:
            progress.counts[what] = self._counts[what] + counts.get(what, 0)
        progress.phase = values.get("phase", progress.phase)
        progress.connections = values.get("connections", 0)
        for note in values.get("notes", ()):
            progress.note(note)


def report_to_json(report: StageReport) -> dict[str, Any]:
    return asdict(report)


def report_from_json(values: Mapping[str, Any]) -> StageReport:
    known = {f.name for f in fields(StageReport)}
    given = {name: value for name, value in values.items() if name in known}
    given["skipped"] = tuple(Skipped(**one) for one in given.get("skipped", ()))
    given["notes"] = tuple(given.get("notes", ()))
    return StageReport(**given)


def error_to_json(error: HeadraceError) -> dict[str, Any]:
    """The one object that says what went wrong; `{"error": …}` as on the command line."""
    return {"error": {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}}


def error_from_json(values: Mapping[str, Any]) -> HeadraceError:
    """The same error here; of a kind that only a newer version knows, the nearest one of its group."""
    kinds = {one.__name__: one for one in _tree(HeadraceError)}
    codes = {one.exit_code: one for one in kinds.values()}
    code = values.get("exit_code", 1)
    found = (
        kinds.get(values.get("kind", "")) or codes.get(code) or codes.get(code // 10 * 10) or HeadraceError
    )
    return found(str(values.get("message", "the agent failed without saying why.")))


def _tree(base: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [base, *(one for sub in base.__subclasses__() for one in _tree(sub))]
