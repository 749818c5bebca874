"""Stream directories: a model's small files as ordinary files, and where its weights come from.

::

    <directory>/config.json, tokenizer.json, ...     complete, under their names
               /<shard>.safetensors.header           each shard's header (length and JSON), no tensor
               /snapshot.json                        which snapshot of which reference, and in which store

A program that wants a model's folder before the weights are there gets one that never shows half a file under
its real name; loading it takes the weights from the store, while they arrive. Stream directories are made by
`headrace stage --stream SRC DST`, and by the volume driver.

Crash story. Each file is written whole or not at all, `snapshot.json` last: a directory without it is no
stream directory yet, and making it again completes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.cache import config, disk
from headrace.cache.durable import make_dirs, write_file
from headrace.cache.errors import LoadError, NotFound, NotStaged, OriginChanged, StoreError
from headrace.cache.object import read_exactly
from headrace.cache.reading import StoredFile, StoredSnapshot
from headrace.cache.reference import parse
from headrace.cache.safetensors import PREFIX, header_length
from headrace.cache.staging import StagingJob, open_for_loading
from headrace.cache.store import Store, default_root

NAME = "snapshot.json"
HEADER = ".header"
FORMAT = 1
MOST_SMALL = 256 * 1024 * 1024
"""Larger files are not delivered: tokenizers have tens of megabytes."""

_LONGEST = 1024 * 1024
SUFFIX = ".safetensors"
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")


@dataclass(frozen=True, slots=True)
class Record:
    """What `snapshot.json` says.

    Attributes:
        reference: where the model can be staged from.
        snapshot: id of the snapshot that the small files are from.
        domain: its trust domain; None: the configured one.
        root: the store that it was staged into; None: the configured one.
    """

    reference: str
    snapshot: str
    domain: str | None = None
    root: str | None = None
    format: int = FORMAT


def is_stream_directory(location: str | os.PathLike[str]) -> bool:
    """Whether this is a directory with a `snapshot.json`."""
    return os.path.isfile(os.path.join(location, NAME))


def read_record(location: str | os.PathLike[str]) -> Record:
    """What a stream directory says.

    Raises:
        NotFound: there is no `snapshot.json`.
        LoadError: it is not usable, or of a later format.
    """
    path = Path(location, NAME)
    again = "make the directory again with `headrace stage --stream`"
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(_LONGEST).decode())
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist: {again}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not usable ({error}): {again}") from error
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise LoadError(f"{path} is not a headrace snapshot: {again}")
    if value["format"] > FORMAT:
        raise LoadError(f"{path} is of format {value['format']}, newer than this headrace: upgrade it")
    texts: dict[str, Any] = {key: value.get(key) for key in ("reference", "snapshot", "domain", "root")}
    for key, text in texts.items():
        if not (isinstance(text, str) and text) and (text is not None or key in ("reference", "snapshot")):
            raise LoadError(f"{path} has no usable {key}: {again}")
    return Record(**texts, format=value["format"])


def open_stream_directory(
    location: str | os.PathLike[str],
    *,
    root: str | None = None,
    domain: str | None = None,
    progress: Any = None,
) -> StoredSnapshot:
    """The model of a stream directory: from the store if it is complete there, else staged as far as needed.

    Args:
        root, domain: instead of those that the directory names.

    Raises:
        OriginChanged: the reference means another revision by now, and the recorded one is not in the store.
        HeadraceError: whatever opening the reference raises.
    """
    record = read_record(location)
    root = root or (record.root if record.root and os.path.isdir(record.root) else None)
    domain = domain or record.domain
    source = _complete(record, root, domain)
    if source is None:
        source = open_for_loading(record.reference, root=root, domain=domain, progress=progress)
    if source.snapshot != record.snapshot:
        source.close()
        raise OriginChanged(
            f"{record.reference} is another revision now than the one in {os.fspath(location)}: "
            "make the directory again with `headrace stage --stream`"
        )
    return source


def write_stream_directory(job: StagingJob, destination: str | os.PathLike[str]) -> tuple[Record, list[str]]:
    """Run a staging job just as far as a stream directory needs, and write that.

    What was staged of the weights until then stays in the store.

    Returns:
        What `snapshot.json` says, and the paths of the small files.

    Raises:
        StoreNotWritable, NoSpace: the destination cannot be written.
        HeadraceError: as staging.
    """
    job.start()
    try:
        domain, snapshot = job.wait_prepared()
        source = StoredSnapshot(domain, snapshot, name=job.request.reference, check=job.check, job=job)
        with contextlib.closing(source):
            root = str(domain.path.parent.parent)
            record = Record(str(parse(job.request.reference)), snapshot.id, domain.name, root)
            target = Path(destination)
            try:
                return record, _write(source, target, record)
            except OSError as error:
                raise disk.translated(error, target, "writing a stream directory") from error
    finally:
        job.cancel()


def _write(source: StoredSnapshot, target: Path, record: Record) -> list[str]:
    small = []
    make_dirs(target)
    (target / NAME).unlink(missing_ok=True)
    for path in source.paths():
        with contextlib.closing(source.open(path)) as file:
            name, stop = path, file.size
            if path.endswith(SUFFIX):
                name, stop = path + HEADER, PREFIX + header_length(_read(file, PREFIX), file.size, path)
            elif path.endswith(_WEIGHTS) or file.size > MOST_SMALL:
                continue
            else:
                small.append(path)
            place = target / name
            make_dirs(place.parent)
            write_file(place, _read(file, stop))
    write_file(target / NAME, json.dumps(asdict(record), indent=1).encode() + b"\n")
    return small


def _read(file: StoredFile, stop: int) -> bytes:
    """The first `stop` bytes, as soon as they are staged."""
    while not file.ready(0, stop):
        file.wait(0, stop)
    data = read_exactly(file.fileno(), 0, stop)
    if data is None:
        raise LoadError(
            f"{file.path!r} in the store is shorter than it should be: run `headrace verify --repair`."
        )
    return data


def _complete(record: Record, root: str | None, domain: str | None) -> StoredSnapshot | None:
    """The recorded snapshot where it lies complete in the store, whatever its reference means by now."""
    settings = config.load()
    try:
        with Store.open(root or settings.root or default_root(), writable=False) as store:
            found = store.domain(domain or settings.domain)
            snapshot = found.find(record.snapshot)
            if not snapshot.complete:
                return None
            return StoredSnapshot(found, snapshot, name=record.reference)
    except (NotStaged, StoreError):
        return None
