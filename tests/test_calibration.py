"""The bins and the error of calibration, by hand; runs and estimators share them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ltloss import _calibration
from ltloss._calibration import binned
from ltloss._estimator.calibration import calibration_error
from ltloss._estimator.space import Part
from ltloss.training.measure.calibration import Calibration


@pytest.mark.parametrize(
    ("confidence", "number"),
    [
        (0.0, 0),
        (1 / 15, 0),
        (math.nextafter(1 / 15, 1), 1),
        (math.nextafter(0.2, 0), 2),
        (0.2, 2),
        (math.nextafter(0.2, 1), 3),
        (float(np.float32(0.2)), 3),  # which is 0.2000000030
        (7 / 15, 6),
        (14 / 15, 13),
        (math.nextafter(14 / 15, 1), 14),
        (1.0, 14),
        (1.0000001, 14),  # a softmax that was rounded up
        (math.nan, 0),
    ],
)
def test_an_upper_edge_belongs_to_its_bin(confidence: float, number: int) -> None:
    (found,) = binned(torch.tensor([confidence], dtype=torch.float64), torch.tensor([True]))[0].nonzero()
    assert int(found) == number


def test_no_edge_but_1_is_a_float32_number() -> None:
    """So float32 probabilities fall into the same bins whatever the rule at an edge is."""
    edges = np.arange(1, 16) / 15
    assert [m for m, edge in enumerate(edges, 1) if float(np.float32(edge)) == edge] == [15]


def test_sums_and_error_by_hand() -> None:
    """0.1 is in bin 2 of (1/15, 2/15], 0.5 in bin 8: |2 − 0.3| + |1 − 0.5| of a weight of 4."""
    confidence, right = torch.tensor([0.1, 0.1, 0.5], dtype=torch.float64), torch.tensor([True, False, True])
    sums = binned(confidence, right, torch.tensor([2.0, 1.0, 1.0]))
    assert sums[:, 1].tolist() == pytest.approx([3.0, 2.0, 0.3])
    assert sums[:, 7].tolist() == [1.0, 1.0, 0.5]
    assert _calibration.calibration_error(sums) == pytest.approx(2.2 / 4)
    assert _calibration.calibration_error(torch.zeros(3, 15)) is None


def test_an_estimator_has_the_error_of_a_run() -> None:
    """Four predictions at 1/5 of which weights of 4 of 5 are right, and a sure one that is wrong."""
    logits = torch.zeros(5, 5)
    logits[4, 3] = 60.0
    labels, weights = torch.tensor([0, 1, 0, 0, 2]), torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])
    classifier: Any = SimpleNamespace(prototypes=torch.zeros(5, 2), logits=lambda z: z)

    class Batches:
        device = torch.device("cpu")

        def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
            return logits[rows]

    batches: Any = Batches()
    found = calibration_error(classifier, batches, Part(torch.arange(5), labels, weights))
    assert found == pytest.approx((4 - 1 + 1) / 6, rel=1e-6)
    run, index = Calibration(), torch.tensor([0, 1, 2, 2, 3, 4])  # a weight of 2 is the sample twice
    confidence, best = logits[index].softmax(1).max(1)
    run.add(confidence.double().numpy(), (best == labels[index]).numpy())
    assert run.error() == found
