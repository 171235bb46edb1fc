"""The example finds each mistake with the technique that its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_report.report import missing_tools

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does"),
]


def test_it_prints_what_the_page_shows(tmp_path: Path) -> None:
    if why := missing_tools():
        pytest.skip(why)
    page = (ROOT / "docs" / "testing-kernels.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(the right kernel.*?)```", page, re.DOTALL)
    assert shown is not None
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("OMP_NUM_THREADS", None)  # as whoever follows the page runs it
    command = [sys.executable, str(ROOT / "examples" / "kernel_without_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.partition("  {")[0].rstrip() for line in done.stdout.splitlines()] == shown[1].splitlines()
    right, spilled = (re.search(rf"^{name} .*?({{.*)", done.stdout, re.MULTILINE)[1] for name in ("none", "too few"))
    assert "'stack': 0" in right
    assert "HGMMA" in right
    assert "'stack': 0" not in spilled
    assert "HGMMA" not in spilled
    assert len(re.findall("found", done.stdout)) == 7


def test_it_needs_nothing_of_this_package() -> None:
    text = (ROOT / "examples" / "kernel_without_gpu.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (ltloss|benchmarks|helpers)", text, re.MULTILINE)
    assert text.count("\n") <= 200
