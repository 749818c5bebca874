"""Shell completion, and what a bare call of the command costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Command

HEAVY = ("torch", "obstore", "rich", "fsspec", "boto3", "aiohttp", "cryptography")


def complete(headrace: Command, words: str) -> list[str]:
    """What bash is offered after `words`."""
    headrace.environ |= {
        "_HEADRACE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    offered = headrace().out.split()
    for name in ("_HEADRACE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        del headrace.environ[name]
    return [word.partition(",")[2] for word in offered]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(headrace: Command, shell: str) -> None:
    script = headrace("completion", shell).out
    assert "_HEADRACE_COMPLETE" in script
    assert headrace("completion", shell, "--json").json["script"] in script
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_an_unknown_shell_is_refused(headrace: Command) -> None:
    assert "bash" in headrace("completion", "tcsh", code=2).err


def test_commands_and_staged_references_are_offered(headrace: Command, model: Path) -> None:
    assert complete(headrace, "headrace ver") == ["verify"]
    assert complete(headrace, "headrace show ") == []
    staged = headrace("stage", model, "--json").json["snapshots"][0]["snapshot"]
    assert set(complete(headrace, "headrace show ")) == {f"file://{model}", staged[:12]}
    assert complete(headrace, f"headrace pin {staged[:4]}") == [staged[:12]]


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["stage", "--help"], ["ls"], ["completion", "bash"]]
)
def test_light_commands_import_nothing_heavy(headrace: Command, args: list[str]) -> None:
    program = "import sys\nfrom headrace.cli.main import main\nmain(sys.argv[1:])\n"
    program += f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        env=headrace.environment(),
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_every_command_is_in_the_help_with_the_shared_options(headrace: Command) -> None:
    from headrace.cli.main import COMMANDS

    text = headrace("--help").out
    for name in COMMANDS:
        assert f"\n  {name} " in text
        if name == "simulate":  # what follows it goes to the simulator, which has no store
            continue
        shown = headrace(name, "--help").out
        for option in ("--root", "--domain", "--json", "--quiet"):
            assert option in shown, (name, option)
