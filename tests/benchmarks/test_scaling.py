"""The scaling benchmark runs as its page says."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[2]


def test_the_command_of_the_page_is_understood() -> None:
    text = " ".join((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").split())
    found = re.search(r"-m benchmarks\.scaling (--[^`]*)`", text)
    assert found
    assert scaling.parse(found[1].split()).embedding_size == 512


@pytest.mark.slow
def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "rows.csv"
    # The process ends before the interpreter does: see "A whole training" in docs/distributed.md.
    script = "import os; from benchmarks import scaling; scaling.main(); os._exit(0)"
    (tmp_path / "run.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "run.py")]
    options = ["--classes", "40", "--embedding-size", "8", "--batch", "16", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, *launcher, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["ranks"], row["classes"], row["dim"]) for row in rows] == [
        ("strong", "2", "40", "8"),
        ("weak", "2", "80", "8"),
    ]
    assert all(float(row["seconds"]) > 0 and int(row["sent_bytes"]) >= int(row["least_bytes"]) for row in rows)
