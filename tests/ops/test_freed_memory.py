from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch, ltloss
torch.set_num_threads(1)
loss_fn = ltloss.CosineSoftmaxLoss(1655, 256, scale=32.0)
features, labels = torch.randn(512, 256, requires_grad=True), torch.randint(1655, (512,))
def steps(count):
    for _ in range(count):
        loss_fn.weight.grad = features.grad = None
        with ltloss.use_workspace(1 << 24, keep_exponentials=True):
            loss_fn(features, labels).backward()
steps(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about the allocator of glibc")
def test_a_step_reuses_the_memory_of_the_last_one() -> None:
    """In a process of its own, for the allocator remembers; without care each step has 4,000 page faults."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 500
