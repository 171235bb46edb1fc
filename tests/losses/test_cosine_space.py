"""Source B by hand: L(t) = α·L_inter + β(t)·Trunc(L_intra − ε) + γ·L_CE."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor

from ltloss import ClassCenters, CosineSpaceLoss

SCALE, MARGIN = 4.0, 0.3
PROTOTYPES = (0.0, 1.0, 2.5)


def on_circle(*angles: float, length: float = 1.0) -> Tensor:
    return length * torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def cross_entropy(angle: float, label: int, margin: float) -> float:
    z = [SCALE * math.cos(angle - a) for a in PROTOTYPES]
    z[label] -= SCALE * margin
    return math.log(sum(map(math.exp, z))) - z[label]


def make(**options: object) -> CosineSpaceLoss:
    given = {"inter_weight": 0.5, "intra_weight": 0.25, "ce_weight": 2.0, "epsilon": 0.01, **options}
    module = CosineSpaceLoss(3, 2, scale=SCALE, margin=MARGIN, **given)
    module.weight.data = on_circle(*PROTOTYPES)
    return module


# Two samples of class 0 at ±0.4 about 0.2, one of class 1: the centre of class 0 lies at the angle 0.2.
ANGLES, LABELS = (-0.2, 0.6, 1.1), (0, 0, 1)
CLOSE = 1e-6  # float32, ten operations on numbers near 1


def batch() -> tuple[Tensor, Tensor]:
    return on_circle(*ANGLES, length=3.0), torch.tensor(LABELS)


def test_all_parts(backend: str) -> None:
    """L_inter is AM-Softmax, L_CE the same logits without margin, L_intra = (1/N) Σ (1 − cos(x_i, c_{y_i}))."""
    module = make()
    total = module(*batch())
    inter = sum(cross_entropy(a, y, MARGIN) for a, y in zip(ANGLES, LABELS, strict=True)) / 3
    plain = sum(cross_entropy(a, y, 0.0) for a, y in zip(ANGLES, LABELS, strict=True)) / 3
    intra = 2 * (1 - math.cos(0.4)) / 3  # the only sample of class 1 is its own centre
    parts = {name: float(value) for name, value in module.terms.items()}
    assert parts == pytest.approx({"inter": inter, "intra": intra, "cross_entropy": plain}, rel=CLOSE)
    assert float(total.detach()) == pytest.approx(0.5 * inter + 0.25 * (intra - 0.01) + 2.0 * plain, rel=CLOSE)


def test_truncation_of_the_batch_and_of_each_sample() -> None:
    """Trunc(v) = max(v, 0) on the batch mean; option: per sample."""
    distance = 1 - math.cos(0.4)  # 0.0789, and 0 for the third sample
    rest = make(intra_weight=0.0)(*batch()).detach()
    for truncate, epsilon, expected in (
        ("batch", 0.05, 2 * distance / 3 - 0.05),
        ("batch", 0.06, 0.0),
        ("sample", 0.06, 2 * (distance - 0.06) / 3),
        ("sample", 0.08, 0.0),
    ):
        got = make(truncate=truncate, epsilon=epsilon)(*batch()).detach() - rest
        assert float(got) == pytest.approx(0.25 * expected, abs=1e-6), (
            truncate,
            epsilon,
        )  # losses near 3


def test_start_step() -> None:
    """β(t) = 0 while fewer than start_step batches were seen, β afterwards."""
    module, without = make(start_step=2), make(intra_weight=0.0)
    differences = [float((module(*batch()) - without(*batch())).detach()) for _ in range(4)]
    expected = 0.25 * (2 * (1 - math.cos(0.4)) / 3 - 0.01)
    assert differences == pytest.approx([0.0, 0.0, expected, expected], abs=1e-6)
    assert int(module.step) == 4


def test_order_of_the_weights() -> None:
    """α, β, γ out of the order γ > α > β is an error that names the three values."""
    with refused("ce_weight=0.5", "inter_weight=0.7", "intra_weight=0.1"):
        CosineSpaceLoss(3, 2, inter_weight=0.7, intra_weight=0.1, ce_weight=0.5)
    with refused("ce_weight=1", "inter_weight=0.5", "intra_weight=0.5"):
        CosineSpaceLoss(3, 2, inter_weight=0.5, intra_weight=0.5, ce_weight=1.0)
    module = CosineSpaceLoss(3, 2, inter_weight=0.7, intra_weight=0.1, ce_weight=0.5, strict=False)
    module.intra_weight = 0.9
    with refused("ce_weight=0.5", "inter_weight=0.7", "intra_weight=0.9"):
        module.strict = True
    module = CosineSpaceLoss(3, 2, inter_weight=0.5, intra_weight=0.25, ce_weight=1.0)
    for name, value in (("ce_weight", 0.5), ("inter_weight", 0.2), ("intra_weight", 0.5)):
        with refused(f"{name}={value}"):
            setattr(module, name, value)
    module.inter_weight = 0.75
    assert (module.ce_weight, module.inter_weight, module.intra_weight) == (1.0, 0.75, 0.25)


def test_no_gradient_through_the_centre() -> None:
    module = make(ce_weight=1.0, inter_weight=0.0, intra_weight=0.0, strict=False)
    module.intra_weight, module.ce_weight, module.epsilon = 1.0, 0.0, 0.0
    x, labels = batch()
    x.requires_grad_()
    module(x, labels).backward()
    # d(1 − cos(x, c))/dφ = sin(φ − φ_c) along the tangent, over N and ‖x‖ = 3; through the centre it would be 0.
    expected = []
    for angle, offset in zip(ANGLES, (-0.4, 0.4, 0.0), strict=True):
        size = math.sin(offset) / 3 / 3
        expected.append([-math.sin(angle) * size, math.cos(angle) * size])
    torch.testing.assert_close(x.grad, torch.tensor(expected), rtol=1e-5, atol=1e-7)


class TestCenters:
    def test_running_mean_over_all_batches(self) -> None:
        """update="mean" keeps the running mean of all unit features seen (count-weighted)."""
        centers = ClassCenters(3, 2)
        centers.update(on_circle(0.1, 0.5, 2.0, length=5.0), torch.tensor([0, 0, 2]))
        centers.update(on_circle(0.9, length=0.1), torch.tensor([0]))
        expected = on_circle(0.1, 0.5, 0.9).mean(0)
        torch.testing.assert_close(centers.centers[0], expected)
        torch.testing.assert_close(centers.centers[2], on_circle(2.0)[0])  # absent from the batch: kept
        assert centers.counts.tolist() == [3, 0, 1]

    def test_exponential_average(self) -> None:
        """update="ema", momentum 0.9: the first batch sets the centre, the next moves it by a tenth."""
        centers = ClassCenters(2, 2, update="ema", momentum=0.9)
        centers.update(on_circle(0.1, 0.5), torch.tensor([0, 0]))
        first = on_circle(0.1, 0.5).mean(0)
        torch.testing.assert_close(centers.centers[0], first)
        centers.update(on_circle(0.9, 1.5), torch.tensor([0, 0]))
        torch.testing.assert_close(centers.centers[0], 0.9 * first + 0.1 * on_circle(0.9, 1.5).mean(0))
        torch.testing.assert_close(centers.centers[1], torch.zeros(2))

    def test_class_never_seen_contributes_nothing(self) -> None:
        module = make(epsilon=0.0).eval()
        module(*batch())
        assert float(module.terms["intra"]) == 0.0
        assert float(ClassCenters(2, 2).cosine(on_circle(0.3), torch.tensor([1]))) == 1.0

    def test_ignored_samples_move_nothing(self) -> None:
        centers = ClassCenters(2, 2)
        centers.update(torch.tensor([[math.nan, 1.0], [1.0, 0.0]]), torch.tensor([-1, 0]))
        assert centers.centers.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert centers.counts.tolist() == [1, 0]

    def test_evaluation_leaves_centres_and_step_alone(self) -> None:
        module = make().eval()
        module(*batch())
        assert int(module.step) == 0
        assert not module.centers.centers.any()

    def test_empty_batch(self) -> None:
        module = make()
        total = module(torch.zeros(0, 2, requires_grad=True), torch.zeros(0, dtype=torch.int64))
        assert float(total.detach()) == 0.0
        total.backward()
        assert not module.weight.grad.any()
        assert not module.centers.centers.any()
