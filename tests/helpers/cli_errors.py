"""What the tests of mistakes on the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.refusals import missing
from ltloss.cli.command import main

TRAIN = ["train", "--data", "digits", "--out", "run", "--device", "cpu", "--quiet", "--epochs", "1"]
ROOT = str(Path(__file__).parents[2])


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *facts: str) -> None:
    """The command line ends with code 2 and one line on stderr that states the facts."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("ltloss: left out"))
    assert line.startswith("ltloss: error: ")
    assert not missing(line, *facts), line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_command(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`ltloss ARGUMENTS` in a process of its own, after `code`."""
    program = f"import sys\n{code}\nfrom ltloss.cli.command import main\nsys.exit(main({list(arguments)!r}))"
    everything = {**os.environ, "PYTHONPATH": ROOT, **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=everything)
