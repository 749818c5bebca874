"""Small real file systems for tests: tmpfs, and ext4 or xfs in an image file on a loop device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., object])


def needs_root(test: Test) -> Test:
    """Mark a test that mounts, or runs as another user."""
    skip = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, or another user")
    marked: Test = pytest.mark.root(skip(test))
    return marked


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs the program {program}")


@contextmanager
def tmpfs(point: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `point`."""
    point.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "headrace-test", str(point))
    try:
        yield point
    finally:
        _unmount(point)


@contextmanager
def image(kind: str, point: Path, size: int) -> Iterator[Path]:
    """A file system of `kind` ("ext4", "xfs") at `point`, in the image `<point>.img`."""
    point.mkdir(parents=True, exist_ok=True)
    backing = point.with_suffix(".img")
    with open(backing, "wb") as file:
        file.truncate(size)
    quiet = ["-q", "-F", "-m", "0"] if kind == "ext4" else ["-q"]
    _run(f"mkfs.{kind}", *quiet, str(backing))
    _run("mount", "-o", "loop", str(backing), str(point))
    try:
        yield point
    finally:
        _unmount(point)


@contextmanager
def read_only(point: Path) -> Iterator[Path]:
    """`point`, read-only through a bind mount of itself."""
    _run("mount", "--bind", str(point), str(point))
    try:
        _run("mount", "-o", "remount,bind,ro", str(point))
        yield point
    finally:
        _unmount(point)


def _unmount(point: Path) -> None:
    try:
        _run("umount", str(point))
    except AssertionError:
        # Still in use, which the failed test says: nothing may stay mounted all the same.
        _run("umount", "--lazy", str(point))
        raise


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
