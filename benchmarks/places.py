"""Where a model lies while it is loaded, and what the page cache holds of it.

A place is a context that gives the model's folder: the machine's own disk, a fast device (xfs on a buffered
loop device, so that a read costs a copy from the page cache of the image), the same one throttled, a tmpfs,
a FUSE mount. All but the disk need root, and the loop devices xfsprogs.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cgroup import io_group, io_throttling
from benchmarks.fuse_files import served
from support.mounts import image, tmpfs
from support.page_cache import kept

from headrace.loader.memory import resident

BLOCK = 8 << 20
THROTTLED = 300e6
_ROOM = 400 << 20  # of a file system's own

_STAGE = """
import sys
from headrace.cache.staging import stage
print(stage(sys.argv[1], root=sys.argv[2], workers=1).path)
"""

WriteModel = Callable[[Path], object]


class Unavailable(Exception):
    """This machine cannot have the place; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A model at a place.

    Attributes:
        model: its folder.
        counted: reads from the device are counted in the reading process.
        cached: whether the page cache can be emptied of it, or filled.
        backing: the image file, which has to stay in the page cache for the device to be fast.
        group: a cgroup in which the device is throttled.
        keeping: what holds the model in the page cache; to be closed before the place goes.
    """

    model: Path
    counted: bool = True
    cached: bool = True
    backing: Path | None = None
    group: Path | None = None
    keeping: ExitStack = field(default_factory=ExitStack)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.model.iterdir() if path.is_file())

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.model.glob("*.safetensors"))


@contextmanager
def on_disk(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """The file system of the scratch folder, as it is."""
    model = scratch / "disk"
    write(model)
    _settle(model)
    try:
        yield Place(model)
    finally:
        shutil.rmtree(model)


@contextmanager
def in_store(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """The same disk, in a store that has staged the model: the digests of its chunks are known."""
    origin, root = scratch / "origin", scratch / "store"
    write(origin)
    try:
        # In a process of its own: this one has to stay without threads, because it forks.
        command = [sys.executable, "-c", _STAGE, f"file://{origin}", str(root)]
        staged = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(origin)
        yield Place(Path(staged.stdout.strip()))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(origin, ignore_errors=True)


@contextmanager
def on_fast_device(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """xfs on a loop device whose image the page cache holds."""
    _need_root("mounts")
    if shutil.which("mkfs.xfs") is None:
        raise Unavailable("needs mkfs.xfs (Debian: xfsprogs)")
    point = scratch / "fast"
    try:
        with image("xfs", point, size + size // 4 + _ROOM) as mounted:
            write(mounted / "model")
            _settle(mounted / "model")
            backing = point.with_suffix(".img")
            with filled([backing], fill_large):
                yield Place(mounted / "model", backing=backing)
    finally:
        point.with_suffix(".img").unlink(missing_ok=True)


@contextmanager
def on_throttled_device(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """The fast device, read through a cgroup that lets 300 MB/s pass."""
    if not io_throttling():
        raise Unavailable("needs a cgroup that throttles block devices, and the right to make one")
    with on_fast_device(scratch, size, write) as place:
        device = place.model.stat().st_dev
        with io_group(device, int(THROTTLED)) as group:
            yield Place(place.model, backing=place.backing, group=group)


@contextmanager
def on_tmpfs(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """A tmpfs: there is no device, and no page cache beside it."""
    _need_root("mounts")
    with tmpfs(scratch / "tmpfs", size + size // 4 + _ROOM) as mounted:
        write(mounted / "model")
        yield Place(mounted / "model", counted=False, cached=False)


@contextmanager
def on_fuse(scratch: Path, size: int, write: WriteModel) -> Iterator[Place]:
    """A FUSE mount of a folder that the page cache holds: each read asks a process."""
    _need_root("mounts")
    if not Path("/dev/fuse").exists():
        raise Unavailable("needs /dev/fuse")
    behind = scratch / "behind"
    write(behind)
    _settle(behind)
    try:
        with filled(sorted(behind.iterdir()), fill_large), served(behind, scratch / "fuse") as mounted:
            yield Place(mounted, counted=False)
    finally:
        shutil.rmtree(behind)


PLACES = {
    "disk": on_disk,
    "store": in_store,
    "fast": on_fast_device,
    "throttled": on_throttled_device,
    "tmpfs": on_tmpfs,
    "fuse": on_fuse,
}


def _need_root(why: str) -> None:
    if os.geteuid() != 0:
        raise Unavailable(f"needs root: {why}")


def _settle(folder: Path) -> None:
    """Only clean pages can be dropped."""
    for path in folder.iterdir():
        with _opened(path) as descriptor:
            os.fsync(descriptor)


# -- the page cache


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def held(paths: Sequence[Path]) -> float:
    """The part of these files that the page cache holds, 0 to 1."""
    total = found = 0.0
    for path in paths:
        with _opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            part = resident(descriptor, 0, size)
            if part is None:
                raise Unavailable("the kernel does not tell what the page cache holds")
            total += size
            found += size * part
    return found / total


def drop(paths: Sequence[Path]) -> None:
    """Make the page cache forget these files; they must be clean."""
    for path in paths:
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def fill_large(paths: Sequence[Path]) -> None:
    """Fill the page cache with reads of 8 MiB, which makes large folios."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with _opened(path) as descriptor:
            at = 0
            while count := os.preadv(descriptor, [buffer], at):
                at += count


def fill_small(paths: Sequence[Path]) -> None:
    """Fill the page cache by faults of a mapping, from the end: nothing is read ahead then but what lies around
    each fault, in folios of one page. (In file order kernels go over to large folios.)"""
    for path in paths:
        with (
            _opened(path) as descriptor,
            mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping,
        ):
            for at in reversed(range(0, len(mapping), mmap.PAGESIZE)):
                mapping[at]


def fill_half(paths: Sequence[Path]) -> None:
    """Every other block of 8 MiB."""
    buffer = bytearray(BLOCK)
    for path in paths:
        with _opened(path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            for at in range(0, os.fstat(descriptor).st_size, 2 * BLOCK):
                os.preadv(descriptor, [buffer], at)


@contextmanager
def filled(paths: Sequence[Path], fill: Callable[[Sequence[Path]], None]) -> Iterator[None]:
    """Fill the page cache with these files, and keep them there."""
    with ExitStack() as mappings:
        for path in paths:
            fill([path])
            mappings.enter_context(kept(path))
        yield


@dataclass(frozen=True, slots=True)
class State:
    """What the page cache holds of the model before each repetition.

    Attributes:
        expected: how much of these files; None: whatever it is.
        fill: runs after everything was dropped; None: nothing does.
        once: only when there is not as much as expected; it is kept there.
    """

    name: str
    expected: Callable[[Sequence[Path]], float] | None
    fill: Callable[[Sequence[Path]], None] | None
    once: bool = False


def _half(paths: Sequence[Path]) -> float:
    """What `fill_half` brings."""
    sizes = [path.stat().st_size for path in paths]
    filled = sum(min(BLOCK, size - at) for size in sizes for at in range(0, size, 2 * BLOCK))
    return filled / sum(sizes)


STATES = {
    state.name: state
    for state in (
        State("cold", lambda paths: 0.0, None),
        State("warm", lambda paths: 1.0, fill_large, once=True),
        State("warm, small folios", lambda paths: 1.0, fill_small, once=True),
        State("half warm", _half, fill_half),
        State("as it is", None, None, once=True),
    )
}
_CLOSE = 0.002


def bring(place: Place, state: State, *, anew: bool = False) -> float:
    """Put the page cache into a state; returns what it holds then.

    Args:
        anew: even if it holds as much already (which does not tell how it was filled).

    Raises:
        Unavailable: it does not get there.
    """
    if place.backing is not None and held([place.backing]) < 0.999:
        fill_large([place.backing])
    files = sorted(place.model.glob("*.safetensors"))
    part = held(files)
    if state.expected is None or not place.cached:
        return part
    expected = state.expected(files)
    if state.once and not anew and abs(part - expected) <= _CLOSE:
        return part
    for _ in range(3):
        place.keeping.close()
        drop(files)
        if state.fill is not None and state.once:
            place.keeping.enter_context(filled(files, state.fill))
        elif state.fill is not None:
            state.fill(files)
        part = held(files)
        if abs(part - expected) <= _CLOSE:
            return part
    raise Unavailable(f"the page cache holds {part:.1%} of the model, and should hold {expected:.1%}")
