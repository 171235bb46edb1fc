"""Everything public can be reached from ``import ltloss``."""

from __future__ import annotations

import subprocess
import sys

import ltloss


def test_every_public_name_can_be_reached() -> None:
    code = "import ltloss; print(sum(getattr(ltloss, name) is not None for name in ltloss.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(ltloss.__all__)
    assert {"contrastive", "extend", "errors", "interop", "testing", "training"} <= set(ltloss.__all__)
