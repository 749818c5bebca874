"""Ctrl-C while waiting for bytes that do not come: the load ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from support.filling_source import FillingSource
from support.safetensors_files import entry, file_bytes
from headrace.loader import load, stream

content = file_bytes([entry("a", "U8", (300_000,))])
with FillingSource(Path(sys.argv[1]), {"model.safetensors": content}, 100_000) as source:
    if sys.argv[2] != "header":
        source.files["model.safetensors"].stage(0)
    print("waiting", flush=True)
    try:
        load(source) if sys.argv[3] == "load" else list(stream(source))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("verb", ["load", "stream"])
@pytest.mark.parametrize("missing", ["header", "data"])
def test_an_interrupted_load_ends(verb: str, missing: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path), missing, verb],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)  # it does wait
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        assert output == "interrupted\n"
        assert process.returncode == 0
