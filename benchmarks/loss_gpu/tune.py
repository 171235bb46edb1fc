"""``python -m benchmarks.loss_gpu --tune``: times every candidate tile at the given shapes, and stores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from benchmarks.peers import Shape


def tune(bench: Any, shapes: Sequence[Shape]) -> int:
    """Print a ranking per kernel and shape for as long as the time lasts."""
    from ltloss.tools import tune_tiles as tuning  # needs Triton

    for shape in shapes:
        sizes = (shape.n, shape.c, shape.d)
        for kernel in get_args(tuning.Kernel):
            if bench.deadline.left() <= 0:
                print(f"left out for time: {kernel} at {shape}")
                continue
            ranking = tuning.rank(kernel, *sizes, bench.dtype, bench.device.kind, bench.repeats)
            print(tuning.show(kernel, sizes, ranking), flush=True)
            bench.device.release()
    return 0
