"""Power loss: a disk in an image file whose state of any moment can be had, and opened by the next boot."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.crashes import wait_until_marked
from support.faulty_server import FaultyServer
from support.mounts import image
from support.processes import Launcher
from support.stores import write_files

_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 7
_SIZE = 320 << 20  # mkfs.xfs wants 300 MiB
_OUTER = 4 << 30
_SYNC_AFTER = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Disk:
    """A file system of `kind` mounted at `point`, in the image `backing`, which lies on xfs."""

    kind: str
    point: Path
    backing: Path

    def clone(self, name: str) -> Path:
        """The image as it is at this moment: what the next boot would find after the power went."""
        target = self.backing.with_name(name)
        with open(self.backing, "rb") as source, open(target, "wb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
        return target


@contextmanager
def disk(kind: str, folder: Path) -> Iterator[Disk]:
    """An "xfs" or "ext4" disk below `folder`, on loop devices."""
    with image("xfs", folder / "outer", _OUTER) as outer, image(kind, outer / "disk", _SIZE) as point:
        yield Disk(kind, point, outer / "disk.img")


def write_back_something(root: Path, choose: random.Random) -> None:
    """As the kernel may do at any time: bring some of the store's dirty pages to the disk, others not."""
    files = [p for name in ("map", "digests", "partial") for p in root.glob(f"domains/*/objects/*/{name}")]
    filling = [path for path in files if not (path.parent / "data").exists()]
    eagerness = choose.choice([0.0, 0.3, 0.6])
    for path in choose.sample(filling, len(filling)):
        if choose.random() >= eagerness:
            continue
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            size = os.fstat(fd).st_size
            start = choose.randrange(max(1, size))
            if path.name == "partial" and choose.random() < 0.5:
                length = choose.randint(1, 512 << 10)
                _libc.sync_file_range(
                    fd, ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE_AND_WAIT
                )
            else:
                os.fsync(fd)
        finally:
            os.close(fd)


def after_power_loss(
    clone: Path, kind: str, truth: Path, files: Sequence[str], reference: str
) -> dict[str, Any]:
    """Boot again with this disk (see `reopened`); what was found. Raises AssertionError for anything wrong."""
    # The original is mounted, and has the same id.
    options = "loop,nouuid" if kind == "xfs" else "loop"
    task = {
        "image": str(clone),
        "options": options,
        "truth": str(truth),
        "files": list(files),
        "reference": reference,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "support.reopened"]
    done = subprocess.run(
        [*command, json.dumps(task)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass
class Losses:
    """What a campaign of power losses has shown: chunks (and objects) by what became of them."""

    clones: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    chunks: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {count}" for name, count in sorted(self.phases.items()))
        chunks = ", ".join(f"{name} {count}" for name, count in sorted(self.chunks.items()))
        return f"{self.clones} clones; chunks: {chunks}, wrong 0; power lost while: {phases}"


@dataclass(frozen=True)
class Outage:
    """A model being staged onto a disk whose power fails again and again."""

    launcher: Launcher
    server: FaultyServer
    disk: Disk
    truth: Mapping[str, bytes]
    folder: Path

    def lose_power(self, losses: Losses, choose: random.Random, clones: int) -> None:
        """Stage once, with so many power losses from its start to a little after its end; then look at each."""
        reference = f"{self.server.url}/model"
        truth = write_files(self.folder / "truth", self.truth)
        root = self.disk.point / "store"
        size = sum(map(len, self.truth.values()))
        pace = self.server.pace
        victim = self.launcher.start(reference=reference, root=root, sync_after=_SYNC_AFTER)
        images = []
        for number, share in enumerate(sorted(choose.uniform(-0.15, 1.15) for _ in range(clones))):
            wait_until_marked(root, min(size, int(size * share)))
            # Before the first and after the last chunk, other things than chunks happen.
            time.sleep(choose.uniform(0, 0.02 if 0 < share < 1 else 0.2))
            write_back_something(root, choose)
            images.append(self.disk.clone(f"clone-{losses.clones + number}.img"))
        victim.wait()
        self.server.pace = None
        try:
            for clone in images:
                found = after_power_loss(clone, self.disk.kind, truth, list(self.truth), reference)
                losses.clones += 1
                losses.phases[found.pop("phase")] += 1
                losses.chunks.update(found)
                clone.unlink()
        finally:
            self.server.pace = pace
        shutil.rmtree(root)
