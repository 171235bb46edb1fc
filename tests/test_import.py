"""Everything public can be reached from ``import ltloss``."""

from __future__ import annotations

import subprocess
import sys

import ltloss


def test_every_public_name_can_be_reached_without_the_compiler() -> None:
    """Importing torch._dynamo takes nearly as long as torch itself: no command waits for it unless it compiles."""
    code = """
import sys, ltloss, ltloss.distributed, ltloss.training.run.trainer
print(sum(getattr(ltloss, name) is not None for name in ltloss.__all__), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(ltloss.__all__)), "False"]
    assert {"contrastive", "extend", "errors", "interop", "testing", "training"} <= set(ltloss.__all__)
