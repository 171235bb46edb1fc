"""What goes wrong before torch is imported is one line too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.refusals import missing

pytestmark = pytest.mark.slow

ROOT = str(Path(__file__).parents[2])
SCRIPT = "import sys; from ltloss.cli.command import main; sys.exit(main())"


@pytest.mark.parametrize("program", [["-m", "ltloss"], ["-c", SCRIPT]], ids=["module", "script"])
def test_wrong_environment_variable(program: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": ROOT, "LTLOSS_BACKEND": "foo"}
    done = subprocess.run([sys.executable, *program, "doctor"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not missing(done.stderr, "LTLOSS_BACKEND", "auto", "triton", "torch", "reference", "'foo'")


@pytest.mark.parametrize("program", [["-m", "ltloss"], ["-c", SCRIPT]], ids=["module", "script"])
def test_interrupted_while_importing(program: list[str], tmp_path: Path) -> None:
    """A torch whose import is interrupted, since a real signal would arrive at another line each time."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt\n")
    line = [sys.executable, *program, "train", "--data", "digits", "--out", str(tmp_path / "run"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert done.stderr.startswith("ltloss: ")
    assert not (tmp_path / "run").exists()


def test_the_command_line_is_read_before_torch_is_there() -> None:
    program = "import sys; from ltloss.cli.command import main; main(['evaluate']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0
