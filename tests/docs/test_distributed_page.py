"""The training of docs/distributed.md on two ranks: the curve of one process, under DDP and under FSDP2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import world

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _curves(rank: int, folder: Path) -> dict[str, list[float]]:
    os.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "example"}
    for match in FENCE.finditer(PAGE.read_text(encoding="utf-8")):
        exec(compile(match[1], PAGE.name, "exec"), namespace)
    return namespace["curves"]  # type: ignore[no-any-return]


def test_the_first_example_alone_under_torchrun(tmp_path: Path) -> None:
    """As a new user has it: the first block of the page in a file of its own, in an empty folder."""
    block = FENCE.search(PAGE.read_text(encoding="utf-8"))
    assert block
    show = "print(f'{loss_fn.weight.to_local().shape[0]} of {loss_fn.num_classes}', flush=True)\n"
    # What the example does is over by then. PyTorch sometimes aborts where gloo's threads meet the end of the
    # interpreter, see the page and pytorch#190489.
    show += "os._exit(0)\n"
    (tmp_path / "example.py").write_text(block[1] + show)
    root = PAGE.parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "example.py"]
    run = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("500 of 1000") == 2  # the lines of two processes may run into each other


def test_the_training_of_the_page_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = world.run(_curves, 2, tmp_path / "two")
    monkeypatch.chdir(tmp_path)  # and back, after it
    alone = _curves(0, tmp_path / "one")
    for curves in found:
        assert list(curves) == ["DDP", "FSDP2"]
        for wrapper, losses in curves.items():
            assert losses == pytest.approx(alone[wrapper], rel=1e-4)
    assert alone["DDP"][-1] != alone["DDP"][0]
