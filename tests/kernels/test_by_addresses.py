"""Blocks by addresses instead of the copy engine, which is what GPUs before Hopper run: 16 bytes of a row at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.kernel_problems import DEVICE, kernel_problem
from torch import Tensor

from ltloss import functional
from ltloss.testing import outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda", reason="what runs on a GPU depends on the GPU"),
]

F16, F32 = torch.float16, torch.float32
SHAPES = [(1, 1, 1), (17, 33, 17), (15, 31, 8), (40, 5, 40), (3, 200, 24), (16, 1, 8), (1, 64, 3), (37, 70, 19)]


@pytest.fixture
def take_the_engine_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("ltloss_kernels.config.tile_table.has_copy_engine", lambda arch: False)


def searched(features: Tensor, prototypes: Tensor) -> list[Tensor]:
    rows = torch.tensor([3, 0, 3], device=DEVICE)
    found = functional.nearest_prototype(prototypes), functional.nearest_prototype(prototypes, rows)
    return [one for pair in (*found, functional.top_k(features, prototypes, 2)) for one in pair]


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_the_same_to_the_last_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, take_the_engine_away: Callable[[], None]
) -> None:
    given = kernel_problem(*shape, dtypes=(dtype, dtype))
    expected = outcome(given, cosine_margin=0.2)
    take_the_engine_away()
    assert all(map(torch.equal, outcome(given, cosine_margin=0.2), expected))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("width", [16, 19])
def test_searches_are_the_same_to_the_last_bit(
    width: int, dtype: torch.dtype, take_the_engine_away: Callable[[], None]
) -> None:
    given = kernel_problem(d=width, dtypes=(dtype, dtype))
    expected = searched(given.features, given.prototypes)
    take_the_engine_away()
    assert all(map(torch.equal, searched(given.features, given.prototypes), expected))


@pytest.mark.parametrize(("width", "dtype"), [(16, F32), (19, F16)])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_lies_between_rows_changes_nothing(
    normalize: bool, width: int, dtype: torch.dtype, take_the_engine_away: Callable[[], None]
) -> None:
    """Rows that begin at multiples of 16 bytes with NaN after each, against rows without anything between them."""

    def apart(values: Tensor) -> Tensor:
        wide = values.new_full((len(values), 24), float("nan"))
        wide[:, :width] = values
        return wide[:, :width]

    take_the_engine_away()
    given = kernel_problem(d=width, dtypes=(dtype, dtype))
    outcomes = []
    for pair in (given[:2], [apart(one) for one in given[:2]]):
        leaves = [one.detach().requires_grad_() for one in pair]
        loss = functional.margin_cross_entropy(*leaves, given.labels, normalize_features=normalize)
        outcomes.append([loss, *torch.autograd.grad(loss, leaves), *searched(*pair)])
    assert all(map(torch.equal, *outcomes))
