"""The example runs under torchrun and prints what one process prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def _start(*launcher: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, *launcher, "examples/class_parallel.py", *(["--fsdp"] if launcher else [])]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_one_process_and_torchrun_print_the_same() -> None:
    assert torch.distributed.is_available()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    alone, launched = (process.communicate(timeout=world.TIMEOUT * 2)[0] for process in (_start(), _start(*launcher)))
    assert alone.count("\n") == 7
    for one, two in zip(alone.splitlines(), launched.splitlines(), strict=True):
        words = zip(one.split(), two.split(), strict=True)
        assert all(a == b or abs(float(a) - float(b)) <= 1e-3 * abs(float(a)) for a, b in words), (one, two)
