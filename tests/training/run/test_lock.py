from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.cli_errors import ROOT, TRAIN, contents, fails
from helpers.refusals import refused

from ltloss.errors import UserError
from ltloss.training.run.lock import LOCK, owned, refuse_if_written

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@contextmanager
def owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that owns the folder until it is ended."""
    code = f"from pathlib import Path; from ltloss.training.run.lock import owned\nwith owned(Path({str(folder)!r})):"
    code += " print('owned', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    try:
        assert process.stdout.readline() == "owned\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_second_training_names_the_owner_and_touches_nothing(
    resume: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with owner(Path("run").resolve()) as first:
        before = contents(Path("run"))
        fails([*TRAIN, *resume], capsys, "run", str(first.pid), socket.gethostname())
        assert contents(Path("run")) == before


def test_second_comparison_names_the_owner_and_touches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with owner(Path("grid").resolve()) as first:
        before = contents(Path("grid"))
        arguments = ["compare", "--data", "digits", "--losses", "ce", "--out", "grid", "--device", "cpu", "--quiet"]
        fails(arguments, capsys, "grid", str(first.pid), socket.gethostname())
        assert contents(Path("grid")) == before


def test_lock_of_a_dead_owner_is_taken_over() -> None:
    with owner(Path("run").resolve()):
        pass
    assert (Path("run") / LOCK).is_file()
    with owned(Path("run")):
        assert (Path("run") / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with refused("run", str(os.getpid()), error=UserError), owned(Path("run")):
            raise AssertionError("owned twice")
    assert not list(Path("run").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_ranks_that_look_at_one_moment_do_not_see_each_other() -> None:
    """A killed owner left its file; each open of it is locked apart, as in processes of their own."""
    import fcntl

    Path("run").mkdir()
    (Path("run") / LOCK).touch()
    flock, looked = fcntl.flock, []

    def look_twice(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if len(looked) < 2:
            looked.append(descriptor)
            refuse_if_written(Path("run"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", look_twice)
        refuse_if_written(Path("run"))
    assert len(looked) == 2
