"""`headrace bench`: finds the benchmarks of a checkout and hands over to them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from support.command import Command

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_benchmarks_are_listed_with_their_purpose(headrace: Command) -> None:
    found = headrace("bench", "--json").json["benchmarks"]
    assert "stage" in found
    assert all(found.values())
    assert headrace("bench", "--names").out.split() == sorted(found)


def test_every_listed_benchmark_can_be_run_briefly(headrace: Command) -> None:
    for name in headrace("bench", "--names").out.split():
        assert "--smoke" in headrace("bench", name, "--help").out


def test_a_benchmarks_exit_code_is_the_commands(headrace: Command) -> None:
    assert "--no-such-option" in headrace("bench", "stage", "--no-such-option", code=2).err


def test_an_unknown_benchmark_is_refused_with_those_there_are(headrace: Command) -> None:
    assert "stage" in headrace("bench", "nonsense", code=2).err


def test_without_a_checkout_it_says_what_is_missing(headrace: Command, tmp_path: Path) -> None:
    """An installed headrace has no benchmarks: here a copy of the code, elsewhere."""
    for portion in ("cache", "cli"):
        shutil.copytree(
            CHECKOUT / portion / "headrace", tmp_path / "installed" / "headrace", dirs_exist_ok=True
        )
    # First on the path, and `-S` leaves out the checkout that this environment has installed.
    site = [path for path in sys.path if path.endswith("site-packages")]
    program = f"import sys; sys.path[:0] = {[str(tmp_path / 'installed'), *site]!r}\n"
    program += "from headrace.cli.main import main\nsys.exit(main(['bench']))\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        env=headrace.environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "checkout" in done.stderr
