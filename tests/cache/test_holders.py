"""Who has an inode open or mapped is found, as far as this user may look."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.mounts import needs_root

from headrace.cache.holders import Holders, holders_of

_HOLD = """
import mmap, os, sys
if len(sys.argv) > 3:
    os.setuid(int(sys.argv[3]))
file = open(sys.argv[1], "rb")
if sys.argv[2] == "mapped":
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.close()
print("ready", flush=True)
sys.stdin.read()
"""


def look(path: Path) -> Holders:
    status = path.stat()
    return holders_of(status.st_dev, status.st_ino)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    return path


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_another_process_is_found_until_it_ends(file: Path, how: str) -> None:
    command = [sys.executable, "-c", _HOLD, str(file), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (holder,) = look(file).found
        assert (holder.pid, holder.how) == (child.pid, how)
        assert "python" in holder.command
        child.kill()
    assert look(file).found == ()


def test_a_replaced_file_is_told_from_the_new_one(file: Path) -> None:
    with open(file, "rb") as reader:
        old = os.fstat(reader.fileno())
        fresh = file.with_name("fresh")
        fresh.write_bytes(b"x")
        fresh.rename(file)
        assert look(file).found == ()
        assert [h.pid for h in holders_of(old.st_dev, old.st_ino).found] == [os.getpid()]


@needs_root
def test_what_this_user_may_not_see_is_counted(file: Path) -> None:
    ask = (
        "import os, sys\nfrom headrace.cache.holders import holders_of\nos.setuid(65534)\n"
        "found = holders_of(int(sys.argv[1]), int(sys.argv[2]))\n"
        "print(len(found.found), found.hidden)\n"
    )
    status = file.stat()
    with open(file, "rb"):
        command = [sys.executable, "-c", ask, str(status.st_dev), str(status.st_ino)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found, hidden = map(int, output.split())
    assert found == 0
    assert hidden > 0
