"""Peak memory of one case, for a process of its own: ``python -m benchmarks.peak_memory step|nearest PROVIDER N C D``.

Prints the bytes beyond the inputs (and, for a training step, beyond the gradients it leaves).
"""

from __future__ import annotations

import sys

import torch

from benchmarks.nearest import nearest_providers
from benchmarks.peers import Inputs, Shape, run_step, training_step_providers
from benchmarks.timing import peak_extra_bytes


def training_step(name: str, shape: Shape) -> int:
    """Bytes that one forward and backward needs beyond parameters, inputs and gradients."""
    provider = next(p for p in training_step_providers() if p.name == name)
    # Loads libraries and starts threads. A compiled function is compiled for its shape, so it warms up at full size.
    warm_up = Inputs.draw(shape if provider.compiled else Shape(8, 32, shape.d))
    run_step(provider.build(warm_up), warm_up)
    inputs = warm_up if provider.compiled else Inputs.draw(shape)
    loss = provider.build(inputs)
    if provider.compiled:
        run_step(loss, inputs)

    return peak_extra_bytes(lambda: run_step(loss, inputs), inputs.drop_gradients) - inputs.gradient_bytes


def nearest(name: str, shape: Shape) -> int:
    """Bytes that one nearest-prototype search needs beyond the prototypes and the result (12 bytes a class)."""
    search = nearest_providers()[name]
    with torch.no_grad():
        search(torch.randn(32, shape.d))
        prototypes = torch.randn(shape.c, shape.d)
        kept: list[object] = []
        return peak_extra_bytes(lambda: kept.append(search(prototypes)), lambda: None) - 12 * shape.c


if __name__ == "__main__":
    kind, provider_name, *sizes = sys.argv[1:]
    measure = {"step": training_step, "nearest": nearest}[kind]
    print(measure(provider_name, Shape(*(int(size) for size in sizes))))
