"""Import: adopt a local directory, or a model of a Hugging Face cache, into the store.

It is staged from where it lies, verified as ever, and remembered by a name, so that a later
`stage hf://org/name --revalidate never` needs no origin.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.cache import config
from headrace.cache.errors import CheckpointError, NotFound, UsageError
from headrace.cache.prepare import StageRequest
from headrace.cache.progress import Progress
from headrace.cache.reference import parse
from headrace.cache.snapshot import Selection
from headrace.cache.staging import StageReport, StagingJob, run
from headrace.cache.store import Store

_HUB_FOLDER = re.compile(r"(?P<kind>models|datasets|spaces)--(?P<name>.+)")
_MAX_INDEX = 256 << 20


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """One revision in a Hugging Face cache.

    Attributes:
        path: its folder of links.
        repository: "org/name", with "datasets/" or "spaces/" before it where it is one.
        commit: the revision.
        current: whether the cache's `main` is this commit.
    """

    path: Path
    repository: str
    commit: str
    current: bool


def import_folder(
    path: Path | str,
    *,
    root: str | os.PathLike[str] | None = None,
    domain: str | None = None,
    name: str | None = None,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> StageReport:
    """Stage a folder of this machine and remember it by a name.

    Args:
        path: a directory or file, a `models--org--name` folder, or its `snapshots/<revision>`.
        name: a reference that is to mean it from now on; None takes `hf://org/name@revision` (and
            `hf://org/name` if it is the cache's `main`) for a Hugging Face cache, else the path.

    Raises:
        NotFound: there is no such path.
        CheckpointError: the cache holds only a part of the model; names what is missing.
        UsageError: a cache folder without a current revision, or a name that is no reference.
        HeadraceError: as `stage`.
    """
    place = Path(os.path.abspath(path))
    if not place.exists():
        raise NotFound(f"{str(place)!r} does not exist: give a directory or a file.")
    cached = hub_snapshot(place)
    names = [str(parse(name))] if name is not None else _names(cached)
    if cached is not None:
        place = cached.path
        _check_whole(place)
    selection = Selection(tuple(include), tuple(ignore))
    request = StageRequest(
        str(place),
        None if root is None else os.fspath(root),
        domain,
        selection,
        # What lies there now is meant, whatever the name stood for before.
        revalidate="always",
        name=names[0] if names else None,
    )
    report = run(StagingJob(request, progress))
    if len(names) > 1:
        settings = config.load()
        with Store.open(request.root or settings.root) as store:
            snapshot = store.domain(domain or settings.domain).snapshot(report.snapshot)
            for more in names[1:]:
                snapshot.add_name(more, selection)
    return report


def hub_snapshot(place: Path) -> HubSnapshot | None:
    """What of a Hugging Face cache a path is: None if it is no part of one.

    Raises:
        UsageError: a model's folder without a current revision; lists those that are there.
    """
    if (match := _HUB_FOLDER.fullmatch(place.name)) is not None and (place / "snapshots").is_dir():
        commit = _main(place)
        there = sorted(entry.name for entry in (place / "snapshots").iterdir())
        if commit is None and len(there) == 1:
            commit = there[0]
        if commit not in there:
            raise UsageError(
                f"{str(place)!r} is a Hugging Face cache without a current revision: name one of its "
                f"snapshots/ ({', '.join(there) or 'none is there'})."
            )
        folder = place
    else:
        folder, commit = place.parent.parent, place.name
        match = _HUB_FOLDER.fullmatch(folder.name)
        if match is None or place.parent.name != "snapshots":
            return None
    assert commit is not None
    repository = match["name"].replace("--", "/", 1)
    if match["kind"] != "models":
        repository = f"{match['kind']}/{repository}"
    main = _main(folder)
    return HubSnapshot(folder / "snapshots" / commit, repository, commit, main in (None, commit))


def _main(folder: Path) -> str | None:
    try:
        return (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _names(cached: HubSnapshot | None) -> list[str]:
    if cached is None:
        return []
    names = [f"hf://{cached.repository}@{cached.commit}"]
    if cached.current:
        names.append(f"hf://{cached.repository}")
    return [str(parse(name)) for name in names]


def _check_whole(place: Path) -> None:
    """A cache may hold what one program asked for; as the whole model it may not be remembered.

    Raises:
        CheckpointError: an index names shards that are not there.
    """
    for index in sorted(place.rglob("*.safetensors.index.json")):
        if index.stat().st_size > _MAX_INDEX:
            raise CheckpointError(f"{str(index)!r} is too large for an index of shards.")
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(index)!r} is not an index of shards ({error}).") from None
        missing = sorted(str(s) for s in shards if not (index.parent / str(s)).exists())
        if missing:
            raise CheckpointError(
                f"the Hugging Face cache holds only a part of the model: {index.name} names {len(missing)} "
                f"files that are not there ({', '.join(missing[:3])}): complete the download first."
            )
