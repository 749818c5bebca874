"""`headrace bench load`: what it says can be believed, and who is missing is named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import Command
from support.mounts import needs_root

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(headrace: Command, tmp_path: Path) -> Any:
    """Runs cases briefly; gives the JSON and what was printed."""

    def run(*arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        report = tmp_path / "report.json"
        done = headrace(
            "bench", "load", "--smoke", "--folder", tmp_path, "--json", report, *arguments, code=code
        )
        return json.loads(report.read_text())["cases"], done.out

    return run


def left_out(case: dict[str, Any]) -> None:
    if "left out" in case:
        pytest.skip(case["left out"])


def in_a_process(program: str, *arguments: str | Path) -> str:
    """Runs a program that forks: the test process has threads."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=CHECKOUT,
        env={"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cold_and_warm_are_shown_by_bytes_of_the_device(bench: Any, tmp_path: Path) -> None:
    cases, printed = bench("--case", "cold", "--case", "warm", "--only", "raw O_DIRECT", "raw read(2)")
    left_out(cases["cold"])
    cold, warm = cases["cold"]["loaders"], cases["warm"]["loaders"]
    for one in (cold["headrace"], cold["raw O_DIRECT"]):
        assert all(0.99 <= device <= 1.05 for device in one["device"])
    assert set(warm["headrace-buffered"]["device"]) == set(warm["raw read(2)"]["device"]) == {0.0}
    assert cases["cold"]["ratios"]["raw O_DIRECT"]["n"] == 2
    assert {claim["limit"] for claim in cases["cold"]["claims"]} == {1.05, 0.1, 64.0}
    assert "claim headrace / raw O_DIRECT <= 1.05" in printed
    assert not [path for path in tmp_path.iterdir() if path.name not in ("home", "report.json")]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_loader_that_is_not_installed_is_named_and_left_out(
    bench: Any, headrace: Command, tmp_path: Path
) -> None:
    (tmp_path / "without").mkdir()
    for module in ("runai_model_streamer", "fastsafetensors"):
        (tmp_path / "without" / f"{module}.py").write_text("raise ImportError('no such package')\n")
    headrace.environ["PYTHONPATH"] = str(tmp_path / "without")
    plot = tmp_path / "plot.png"
    cases, printed = bench("--case", "small", "--plot", str(plot))
    loaders = cases["small"]["loaders"]
    assert loaders["runai"] == {"absent": "not installed: no such package"}
    assert "not installed" in printed
    assert set(cases["small"]["ratios"]) == {"load_file", "safe_open+clone"}
    assert plot.read_bytes().startswith(b"\x89PNG")


_LOADERS = """
import dataclasses, sys
from pathlib import Path
from benchmarks import cases, contest, peers
from benchmarks.places import Unavailable
from benchmarks.repetition import Failed, Held

honest = peers.LOADERS["load_file"]

def wrong(model, device):
    def load():
        held = honest.prepare(model, device)()
        next(iter(held.tensors.values()))[0] += 1
        return held
    return load

def broken(model, device):
    def load():
        raise ValueError("cannot\\nread")
    return load

def greedy(model, device):
    def load():
        held = honest.prepare(model, device)()
        return dataclasses.replace(held, keep=b"x" * (100 << 20))
    return load

for prepare in (wrong, broken, greedy):
    peers.LOADERS[prepare.__name__] = peers.Loader(prepare.__name__, prepare)

def run(ours, *others):
    case = cases.Case("test", "a test", ours, state="warm", others=others, bounds=(cases.Bound("beyond", 64e6, "MB"),))
    return contest.Contest(case, "cpu", 10_000_000, 1, True).run(Path(sys.argv[1]))
"""


def test_who_loads_something_else_is_found_out(tmp_path: Path) -> None:
    program = _LOADERS + "try: run('load_file', 'wrong')\nexcept Failed as error: print(error)\n"
    assert "not everybody loaded the same tensors" in in_a_process(program, tmp_path)


def test_a_rival_that_fails_is_reported_and_ours_must_not(tmp_path: Path) -> None:
    program = _LOADERS + "print(run('load_file', 'broken').table())\n"
    program += "try: run('broken')\nexcept Failed as error: print('ours', error)\n"
    printed = in_a_process(program, tmp_path)
    assert "failed: ValueError: cannot" in printed
    assert "ours ValueError: cannot" in printed


def test_memory_beyond_the_tensors_is_counted(tmp_path: Path) -> None:
    program = _LOADERS + (
        "modest = run('load_file'); greedy = run('greedy')\n"
        "for one in (modest, greedy):\n"
        "    [verdict] = one.verdicts()\n"
        "    print(verdict.met, verdict.found.median)\n"
    )
    modest, greedy = (line.split() for line in in_a_process(program, tmp_path).splitlines())
    assert modest[0] == "True"
    assert greedy[0] == "False"
    assert 100 <= float(greedy[1]) - float(modest[1]) <= 110


def test_only_who_takes_memory_is_given_some_beforehand(tmp_path: Path) -> None:
    program = _LOADERS + (
        "rows = run('headrace-mapped', 'headrace-buffered').rows\n"
        "for name in ('headrace-mapped', 'headrace-buffered'):\n"
        "    print(*(outcome.private for outcome in rows[name].outcomes))\n"
    )
    mapped, buffered = (line.split() for line in in_a_process(program, tmp_path).splitlines())
    assert max(map(int, mapped)) < 5_000_000
    assert min(map(int, buffered)) > 9_000_000


def test_a_path_that_is_far_behind_is_not_the_best() -> None:
    program = (
        "from types import SimpleNamespace\n"
        "from benchmarks import cases, contest\n"
        "result = contest.Result(cases.CASES[0], 1, 1, 'cold')\n"
        "for name, walls in {'a': [1, 1, 9], 'b': [1.9, 3, 3], 'c': [2.1, 3, 3]}.items():\n"
        "    outcomes = [SimpleNamespace(cost=SimpleNamespace(wall=wall)) for wall in walls]\n"
        "    result.rows[name] = contest.Row(outcomes)\n"
        "assert result.near(['a', 'b', 'c']) == ['a', 'b']\n"
        "assert result.near([]) == []\n"
    )
    in_a_process(program)


def test_what_is_kept_in_the_page_cache_stays_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks import places\n"
        "files = [Path(sys.argv[1])]\n"
        "places._settle(files[0].parent)\n"
        "with places.filled(files, places.fill_large):\n"
        "    places.drop(files)\n"
        "    assert places.held(files) == 1.0\n"
        "places.drop(files)\n"
        "assert places.held(files) == 0.0\n"
    )
    in_a_process(program, tmp_path / "file")


def test_every_rival_runs_next_to_ours_and_the_order_changes() -> None:
    program = (
        "from benchmarks.contest import _trios\n"
        "for count in range(1, 6):\n"
        "    rivals = [f'r{n}' for n in range(count)]\n"
        "    rounds = [list(_trios('ours', rivals, number)) for number in range(4)]\n"
        "    for trios in rounds:\n"
        "        assert sorted(n for trio in trios for n in trio if n != 'ours') == rivals\n"
        "        assert all(trio.count('ours') == 1 and len(trio) <= 3 for trio in trios)\n"
        "        assert all(len(trio) < 3 or trio[1] == 'ours' for trio in trios)\n"
        "    for rival in rivals:\n"
        "        befores = [t.index(rival) < t.index('ours') for r in rounds for t in r if rival in t]\n"
        "        assert sum(befores) == 2, (rivals, rival, rounds)\n"
    )
    in_a_process(program)


@needs_root
def test_the_fuse_mount_gives_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.bin").write_bytes(bytes([number]) * (number * 100_000 + 1))
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from benchmarks.fuse_files import served\n"
        "folder, point = map(Path, sys.argv[1:])\n"
        "with served(folder, point):\n"
        "    assert sorted(os.listdir(point)) == sorted(os.listdir(folder))\n"
        "    for path in folder.iterdir():\n"
        "        assert (point / path.name).read_bytes() == path.read_bytes()\n"
        "        with open(os.open(point / path.name, os.O_RDONLY | os.O_DIRECT), 'rb', 0) as file:\n"
        "            assert path.read_bytes().startswith(file.read(4096))\n"
        "    assert not (point / 'missing').exists()\n"
        "assert not os.path.ismount(point)\n"
    )
    in_a_process(program, folder, tmp_path / "point")
