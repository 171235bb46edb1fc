"""The walk from a loss to its kernels, counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.walkthrough import option_lists

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(scale, angle, cosine, *, reduction, ignore_index): ...", [1]),
        ("def f(scale, angle, angular_margin, cosine, reduction): ...", []),  # two names of one option
        ("\nf(scale, margin.angle, self.cosine, reduction='sum', beyond_pi=b)", [2]),
        ("f(1, 2, 3, scale=1, reduction=r)", []),
        (
            "class M:\n  scale: float\n  angle: float\n  cosine: float\n  reduction: str\n  def beyond_pi(s): ...",
            [1],
        ),
    ],
)
def test_options_that_stand_together_are_found(source: str, lines: list[int]) -> None:
    assert option_lists(source) == lines


def test_the_walk_reaches_the_kernels_of_both_passes() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "benchmarks.walkthrough"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "forward: at most 6 host calls" in done.stdout, "the budget of docs/architecture.md"
    assert "backward: at most 3 host calls" in done.stdout
    assert "    kernels/ltloss_kernels/cosine_logsumexp.py: partials" in done.stdout
    assert int(done.stdout.partition("lists of at least 5 options: ")[2].split()[0]) <= 9
