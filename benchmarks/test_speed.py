"""The same providers under pytest-benchmark, at a size for development: ``pytest benchmarks``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.nearest import check_search, nearest_providers
from benchmarks.peers import Inputs, Provider, Shape, check_step, exact_step, run_step, training_step_providers


@pytest.mark.parametrize("provider", training_step_providers(), ids=lambda provider: provider.name)
def test_training_step(benchmark: Any, provider: Provider) -> None:
    """Forward and backward at (128, 10 000, 128)."""
    inputs = Inputs.draw(Shape(128, 10_000, 128))
    loss = provider.build(inputs)
    benchmark.extra_info["relative_error"] = check_step(provider.name, loss, inputs, exact_step(provider.truth, inputs))
    benchmark(run_step, loss, inputs)


@pytest.mark.parametrize("name", nearest_providers())
def test_nearest_prototype(benchmark: Any, name: str) -> None:
    """All of 4000 prototypes of width 128."""
    search, prototypes = nearest_providers()[name], torch.randn(4000, 128)
    benchmark.extra_info["cosine_error"] = check_search(search, prototypes)
    with torch.no_grad():
        benchmark(search, prototypes)
