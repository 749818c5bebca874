"""Exit codes: one for each error, stable, documented, and the same on the command line and in JSON."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Command

from headrace.cache import errors
from headrace.cache.errors import HeadraceError
from headrace.cli import main as entry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"
OTHERS = {0, entry.BUG, entry.CLOSED_PIPE}


def classes(base: type[HeadraceError] = HeadraceError) -> list[type[HeadraceError]]:
    found = [base]
    for sub in base.__subclasses__():
        found += classes(sub)
    return [one for one in found if one.__module__ == errors.__name__]


def documented() -> dict[int, tuple[str, str]]:
    """Code -> (error, meaning) of the table in the documentation."""
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`|-) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return {int(code): (kind, meaning) for code, kind, meaning in rows}


def test_no_two_errors_share_a_code() -> None:
    codes = [one.exit_code for one in classes()]
    assert len(set(codes)) == len(codes)
    assert not OTHERS & set(codes)


def test_the_page_lists_exactly_the_errors_there_are() -> None:
    listed = {code: kind for code, (kind, _) in documented().items() if kind}
    assert listed == {one.exit_code: one.__name__ for one in classes()}
    assert set(documented()) >= OTHERS


def test_the_page_says_what_the_tree_in_the_source_says() -> None:
    tree = dict(re.findall(r"[├└]── (\w+) +\d+ +(.+)", errors.__doc__ or ""))
    for kind, meaning in documented().values():
        if kind in tree:
            assert meaning == tree[kind], kind


def test_an_error_is_one_sentence_and_one_json_object(headrace: Command) -> None:
    result = headrace("stage", "s4://bucket/model", "--json", "--quiet", code=2)
    assert result.err.count("\n") == 1
    message = result.err.removeprefix("headrace: ").strip()
    assert result.json == {"error": {"kind": "UsageError", "message": message, "exit_code": 2}}


@pytest.mark.parametrize("args", [("stage",), ("nonsense",), ("stage", "--no-such-option", "x")])
def test_wrong_arguments_are_usage_errors(headrace: Command, args: tuple[str, ...]) -> None:
    result = headrace(*args, "--json", code=2)
    assert result.json["error"]["kind"] == "UsageError"


def test_a_reader_that_has_gone_is_no_news(headrace: Command, model: Path) -> None:
    headrace("stage", model)
    with headrace.start("ls") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == entry.CLOSED_PIPE


def test_a_bug_is_shown_whole(headrace: Command, model: Path) -> None:
    program = "import sys\nfrom headrace.cli import ls, main\n"
    program += "ls.command.callback = lambda **_: 1 / 0\nsys.exit(main.main(['ls']))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=headrace.environment(),
        check=False,
    )
    assert done.returncode == entry.BUG
    assert "ZeroDivisionError" in done.stderr
    assert "bug in headrace" in done.stderr
