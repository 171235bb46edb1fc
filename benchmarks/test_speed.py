"""The providers under pytest-benchmark, at a size for development: ``pytest benchmarks``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.nearest import SEARCHES, check_found
from benchmarks.peers import ON_CPU, Inputs, Provider, Shape, check_step, exact_step, run_step


@pytest.mark.parametrize("provider", ON_CPU, ids=lambda provider: provider.name)
def test_training_step(benchmark: Any, provider: Provider) -> None:
    """Forward and backward at (128, 10 000, 128)."""
    inputs = Inputs.draw(Shape(128, 10_000, 128))
    loss = provider.build(inputs)
    benchmark.extra_info["relative_error"] = check_step(provider.name, loss, inputs, exact_step(provider.truth, inputs))
    benchmark(run_step, loss, inputs)


@pytest.mark.parametrize("name", SEARCHES)
def test_nearest_prototype(benchmark: Any, name: str) -> None:
    """The nearest of 4000 prototypes of width 128 for each of them."""
    prototypes = torch.randn(4000, 128)
    found = SEARCHES[name](prototypes)
    benchmark.extra_info["shortfall"] = check_found(found, 1e-6, prototypes, prototypes, torch.arange(4000))
    with torch.no_grad():
        benchmark(SEARCHES[name], prototypes)
