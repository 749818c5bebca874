"""What must be the same on all ranks of a node, and who differs in what.

Each rank says a list of (what it is, value); where values differ, those of the majority count as meant, and
the others are named. All ranks compare the same lists, so all come to the same answer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import xxhash

from headrace.cache.errors import LoadError
from headrace.loader.source import Source, SourceFile

Facts = Sequence[tuple[str, str]]
"""What a rank is about to do, as (words for a message, value)."""

_LONGEST = 60  # characters of a value in a message
_ABSENT = "nothing of that kind"


def versions() -> Facts:
    """Of the software that understands plans and makes tensors."""
    import importlib.metadata  # costs something, and only ranks need it

    try:
        ours = importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:  # from a checkout
        ours = "of a checkout"
    return [("the version of headrace", ours), ("the version of torch", torch.__version__)]


def facts_of(source: Source, files: Iterable[tuple[SourceFile, str]], others: Mapping[str, str]) -> Facts:
    """What a rank is about to load.

    Args:
        source: the model.
        files: those that will be read, each with the digest of its header.
        others: more to compare.
    """
    files = list(files)
    facts = [(word, brief([value])) for word, value in others.items()]
    facts += [
        ("the snapshot", source.snapshot or "none"),
        ("the files", brief(file.path for file, _ in files)),
    ]
    for file, digest in files:
        facts += [(f"the size of {file.path}", str(file.size)), (f"the header of {file.path}", digest)]
        if source.snapshot is None:
            facts.append((f"the place of {file.path}", _place(file)))
    return facts


def _place(file: SourceFile) -> str:
    """Which file it is, whatever its path. (Those of a snapshot are right wherever they are.)"""
    try:
        status = os.fstat(file.fileno())
    except OSError as error:
        raise LoadError(f"{file.path} cannot be examined: {error.strerror or error}") from error
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return f"device {device}, inode {status.st_ino}, changed {status.st_mtime_ns}"


def brief(values: Iterable[str]) -> str:
    """A list as a value: the beginning of it, and a digest of all."""
    joined = ", ".join(values)
    if len(joined) <= _LONGEST:
        return joined
    return f"{joined[: _LONGEST - 20]}... ({xxhash.xxh3_64_hexdigest(joined.encode())})"


def compare(facts: Mapping[int, Facts]) -> LoadError | None:
    """What to raise where ranks differ: which they are, and the first thing that each has different."""
    tables = {rank: dict(said) for rank, said in facts.items()}
    words = dict.fromkeys(word for said in facts.values() for word, _ in said)
    found: dict[int, str] = {}
    for word in words:
        values = {rank: table.get(word, _ABSENT) for rank, table in tables.items()}
        if len(set(values.values())) == 1:
            continue
        usual, _ = Counter(values.values()).most_common(1)[0]  # of equals that of the first rank
        usual_rank = next(rank for rank, value in values.items() if value == usual)
        for rank, value in values.items():
            if value != usual and rank not in found:
                found[rank] = f"rank {rank} has {word} {value!r}, rank {usual_rank} {usual!r}"
    if not found:
        return None
    said = "; ".join(found[rank] for rank in sorted(found))
    return LoadError(f"the ranks do not agree on what to load: {said}; give every rank the same")
