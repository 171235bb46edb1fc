"""What goes wrong before torch is imported is one line too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
SCRIPT = "import sys; from ltloss.cli import main; sys.exit(main())"


@pytest.mark.parametrize("program", [["-m", "ltloss"], ["-c", SCRIPT]], ids=["module", "script"])
def test_wrong_environment_variable(program: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": ROOT, "LTLOSS_BACKEND": "foo"}
    done = subprocess.run([sys.executable, *program, "doctor"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "LTLOSS_BACKEND must be one of auto, triton, torch, reference; got 'foo'" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_interrupted_while_importing(tmp_path: Path) -> None:
    """A second after the start torch is still being imported, or data read; the interpreter itself is long up."""
    line = [sys.executable, "-m", "ltloss", "train", "--data", "digits", "--out", str(tmp_path / "run"), "--quiet"]
    line += ["--epochs", "3000"]
    started = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        # Whoever runs the tests in the background of a shell has them inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(1.0)
    started.send_signal(signal.SIGINT)
    error = started.communicate(timeout=60)[1]
    assert (started.returncode, error.count("\n")) == (130, 1), error
    assert error.startswith("ltloss: interrupted")


def test_the_command_line_is_read_before_torch_is_there() -> None:
    program = "import sys; from ltloss.cli import main; main(['evaluate']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0
