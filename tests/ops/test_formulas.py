"""Every formula of the text, with numbers worked out by hand: plain ``math`` on a circle, nothing of the package.

A feature at the angle 0.3 and prototypes at 0, 1 and 2.5: the cosines are those of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ltloss import LDAMLoss, LogitAdjustedLoss, LongTailLoss, functional
from ltloss.class_balance import DeferredWeights, margins_from_counts
from ltloss.functional import (
    cosine_logsumexp,
    feature_norm_penalty,
    margin_cross_entropy,
    min_angle_regularizer,
    nearest_prototype,
)
from ltloss.margins import ANGLE_FLOOR, margin_cosine
from ltloss.testing import outcome

FEATURE = 0.3
PROTOTYPES = (0.0, 1.0, 2.5)
SCALE = 4.0
# Ten operations on numbers near 1 in float64.
EXACT = 1e-14


def on_circle(*angles: float, length: float = 1.0) -> Tensor:
    return length * torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)


def by_hand(target: Callable[[float], float], label: int, others: Callable[[float, int], float] | None = None) -> float:
    """−log P with the target logit ``target(θ)`` and the other logits s·cos θ, or ``others(s·cos θ, c)``."""
    others = others or (lambda logit, c: logit)
    z = target(abs(FEATURE - PROTOTYPES[label]))
    rest = [others(SCALE * math.cos(FEATURE - a), c) for c, a in enumerate(PROTOTYPES) if c != label]
    return math.log(math.exp(z) + sum(math.exp(value) for value in rest)) - z


def loss(label: int, length: float = 2.0, **options: object) -> float:
    options.setdefault("scale", SCALE)
    features, prototypes = on_circle(FEATURE, length=length), on_circle(*PROTOTYPES, length=0.7)
    return float(margin_cross_entropy(features, prototypes, torch.tensor([label]), **options))


@pytest.mark.parametrize("label", [0, 1, 2])
class TestTable:
    """Section 3: what changes on the target logit, and what on the others."""

    def test_cosine_softmax(self, label: int, backend: str) -> None:
        """NormFace: s·cos θ everywhere."""
        assert loss(label) == pytest.approx(by_hand(lambda t: SCALE * math.cos(t), label), rel=EXACT)

    def test_cosface(self, label: int, backend: str) -> None:
        """CosFace = AM-Softmax: cos − m."""
        expected = by_hand(lambda t: SCALE * (math.cos(t) - 0.35), label)
        assert loss(label, cosine_margin=0.35) == pytest.approx(expected, rel=EXACT)

    def test_arcface(self, label: int, backend: str) -> None:
        """ArcFace: cos(θ + m)."""
        expected = by_hand(lambda t: SCALE * math.cos(t + 0.5), label)
        assert loss(label, angular_margin=0.5) == pytest.approx(expected, rel=EXACT)

    def test_combined(self, label: int, backend: str) -> None:
        """Combined margin (InsightFace): cos(m1·θ + m2) − m3."""
        expected = by_hand(lambda t: SCALE * (math.cos(1.1 * t + 0.3) - 0.2), label)
        got = loss(label, angle_multiplier=1.1, angular_margin=0.3, cosine_margin=0.2)
        assert got == pytest.approx(expected, rel=EXACT)

    def test_ldam(self, label: int, backend: str) -> None:
        """LDAM: cos − m_c, m_c ∝ n_c^(−1/4), the rarest class having exactly m."""
        margins = [0.5 * (1 / n) ** 0.25 for n in (256, 16, 1)]
        expected = by_hand(lambda t: SCALE * (math.cos(t) - margins[label]), label)
        module = LDAMLoss.from_counts([256, 16, 1], 2, max_margin=0.5, scale=SCALE)
        assert loss(label, cosine_margin=module.cosine_margin) == pytest.approx(expected, rel=1e-7)  # float32 margins

    def test_long_tail(self, label: int, backend: str) -> None:
        """Source A's L1: cos(θ + m_c), m_c = m / n_c^(1/4)."""
        margins = [0.5 / n**0.25 for n in (256, 16, 1)]
        expected = by_hand(lambda t: SCALE * math.cos(t + margins[label]), label)
        got = loss(label, angular_margin=torch.tensor(margins, dtype=torch.float64))
        assert got == pytest.approx(expected, rel=EXACT)

    def test_logit_adjustment(self, label: int, backend: str) -> None:
        """Balanced softmax / logit adjustment: + τ·log π_y on the target class, + τ·log π_c on the others."""
        log_prior = [1.5 * math.log(n / 13) for n in (9, 3, 1)]
        expected = by_hand(lambda t: SCALE * math.cos(t) + log_prior[label], label, lambda v, c: v + log_prior[c])
        assert loss(label, log_prior=torch.tensor(log_prior, dtype=torch.float64)) == pytest.approx(expected, rel=EXACT)
        module = LogitAdjustedLoss.from_counts([9, 3, 1], 2, tau=1.5)
        assert module.log_prior.tolist() == pytest.approx(log_prior, rel=1e-6)  # float32

    def test_class_weights(self, label: int, backend: str) -> None:
        """Class weights: loss × weight_y."""
        weights = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
        expected = float(weights[label]) * by_hand(lambda t: SCALE * math.cos(t), label)
        assert loss(label, class_weight=weights, reduction="sum") == pytest.approx(expected, rel=EXACT)

    def test_all_of_it_at_once(self, label: int, backend: str) -> None:
        """s·(cos(m1·θ + m2_y) − m3_y) + log-prior_y against s·cos_ic + log-prior_c."""
        m2, m3, b = (0.1, 0.3, 0.2), (0.05, 0.0, 0.15), (-0.2, -1.0, -3.0)
        expected = by_hand(
            lambda t: SCALE * (math.cos(1.2 * t + m2[label]) - m3[label]) + b[label], label, lambda v, c: v + b[c]
        )
        vectors = [torch.tensor(v, dtype=torch.float64) for v in (m2, m3, b)]
        options = dict(zip(("angular_margin", "cosine_margin", "log_prior"), vectors, strict=True))
        assert loss(label, angle_multiplier=1.2, **options) == pytest.approx(expected, rel=EXACT)

    def test_label_smoothing(self, label: int, backend: str) -> None:
        """(1−ε)·(lse − z_y) + ε·(lse − mean_c z_c), on the logits with margin and prior, times weight_y."""
        b, w, eps = (-0.2, -1.0, -3.0), (0.5, 2.0, 3.0), 0.1
        z = [SCALE * math.cos(FEATURE - a) + b[c] for c, a in enumerate(PROTOTYPES)]
        z[label] = SCALE * math.cos(abs(FEATURE - PROTOTYPES[label]) + 0.4) + b[label]
        lse = math.log(sum(map(math.exp, z)))
        expected = w[label] * ((1 - eps) * (lse - z[label]) + eps * (lse - sum(z) / 3))
        got = loss(
            label,
            angular_margin=0.4,
            label_smoothing=eps,
            log_prior=torch.tensor(b, dtype=torch.float64),
            class_weight=torch.tensor(w, dtype=torch.float64),
            reduction="sum",
        )
        assert got == pytest.approx(expected, rel=EXACT)

    def test_feature_length_is_kept(self, label: int, backend: str) -> None:
        """normalize_features=False: the logit is s·‖x_i‖·cos, and the length multiplies the margin term too."""
        s = SCALE * 2.5
        z = s * math.cos(abs(FEATURE - PROTOTYPES[label]) + 0.2)
        rest = [s * math.cos(FEATURE - a) for c, a in enumerate(PROTOTYPES) if c != label]
        expected = math.log(math.exp(z) + sum(map(math.exp, rest))) - z
        got = loss(label, length=2.5, angular_margin=0.2, normalize_features=False)
        assert got == pytest.approx(expected, rel=1e-12)  # exponents of size 10, and log(1 + small) by hand


def test_length_of_a_normalised_feature_does_not_matter(backend: str) -> None:
    """L1, reading: the feature is normalised too, so the logit is s·cos."""
    assert loss(1, length=1e-3) == pytest.approx(loss(1, length=1e3), rel=EXACT)


def test_mean_divides_by_the_summed_weights(backend: str) -> None:
    """`mean` divides by the summed weights of the counted samples, as F.cross_entropy does; `mean` without: by N."""
    x, w = on_circle(FEATURE, FEATURE, FEATURE, FEATURE), on_circle(*PROTOTYPES)
    labels, weights = torch.tensor([0, 1, -100, 2]), (0.5, 2.0, 3.0)
    each = [by_hand(lambda t: SCALE * math.cos(t), y) for y in range(3)]
    weighted = [a * b for a, b in zip(weights, each, strict=True)]
    class_weight = torch.tensor(weights, dtype=torch.float64)

    def got(**options: object) -> Tensor:
        return margin_cross_entropy(x, w, labels, scale=SCALE, **options)

    assert float(got()) == pytest.approx(sum(each) / 3, rel=EXACT)
    assert float(got(class_weight=class_weight)) == pytest.approx(sum(weighted) / sum(weights), rel=EXACT)
    assert float(got(class_weight=class_weight, reduction="sum")) == pytest.approx(sum(weighted), rel=EXACT)
    per_sample = got(class_weight=class_weight, reduction="none").tolist()
    assert per_sample == pytest.approx([weighted[0], weighted[1], 0.0, weighted[2]], rel=EXACT)


def test_margin_of_a_class() -> None:
    """m_c = m / n_c^(1/k), k = 4; `normalize="max"` rescales so that the rarest class has exactly m."""
    assert margins_from_counts([16, 81, 1], 0.6).tolist() == pytest.approx([0.3, 0.2, 0.6], rel=1e-6)
    assert margins_from_counts([16, 81], 0.6, normalize="max").tolist() == pytest.approx([0.6, 0.4], rel=1e-6)
    assert margins_from_counts([8, 27], 0.6, count_exponent=1 / 3).tolist() == pytest.approx([0.3, 0.2], rel=1e-6)


def test_two_numbers_per_sample(backend: str) -> None:
    """r_i = log Σ_{c≠y_i} exp(l_ic), t_i = l_{i,y_i}, l_ic = s·cos_ic + b_c."""
    b = (-0.2, -1.0, -3.0)
    r, t = cosine_logsumexp(
        on_circle(FEATURE, length=3.0),
        on_circle(*PROTOTYPES, length=0.1),
        torch.tensor([1]),
        scale=SCALE,
        log_prior=torch.tensor(b, dtype=torch.float64),
    )
    z = [SCALE * math.cos(FEATURE - a) + b[c] for c, a in enumerate(PROTOTYPES)]
    assert float(r) == pytest.approx(math.log(math.exp(z[0]) + math.exp(z[2])), rel=EXACT)
    assert float(t) == pytest.approx(z[1], rel=EXACT)


@pytest.mark.parametrize("exponent", [60.0, 200.0])
def test_no_floor_under_a_confident_sample(exponent: float, backend: str) -> None:
    """loss_i = softplus(r_i − z_i): e^−60 is still right in float64, and nothing is pinned at 69.07 the other way."""
    x, w = on_circle(0.0), on_circle(0.0, math.pi)
    loss_right = margin_cross_entropy(x, w, torch.tensor([0]), scale=exponent / 2)
    assert float(loss_right) == pytest.approx(math.exp(-exponent), rel=1e-12)  # rounding of the exponent
    loss_wrong = margin_cross_entropy(x, w, torch.tensor([1]), scale=exponent / 2)
    assert float(loss_wrong) == pytest.approx(exponent, rel=EXACT)


class TestBeyondPi:
    """Beyond θ + m = π: −2 − cos(θ + m), the original cos θ − m·sin m, or what others do."""

    def test_values(self) -> None:
        theta, m = 3.0, 0.5
        cosine = torch.tensor([math.cos(theta)], dtype=torch.float64)
        monotone = margin_cosine(cosine, angular_margin=m)
        assert float(monotone) == pytest.approx(-2 - math.cos(theta + m), rel=EXACT)
        original = margin_cosine(cosine, angular_margin=m, beyond_pi="arcface")
        assert float(original) == pytest.approx(math.cos(theta) - m * math.sin(m), rel=EXACT)

    @pytest.mark.parametrize(
        ("name", "theta", "m", "value", "slope"),
        [
            ("cosine", 3.0, 0.5, math.cos(3.5), math.sin(3.5) / math.sin(3.0)),
            ("cosine", 1.0, 0.5, math.cos(1.5), math.sin(1.5) / math.sin(1.0)),
            ("clip", 3.0, 0.5, -1.0, 0.0),
            ("clip", 0.3, -0.5, 1.0, 0.0),
            ("clip", 1.0, 0.5, math.cos(1.5), math.sin(1.5) / math.sin(1.0)),
            ("easy", 1.6, 0.5, math.cos(1.6), 1.0),
            ("easy", 1.5, 0.5, math.cos(2.0), math.sin(2.0) / math.sin(1.5)),
        ],
    )
    def test_what_others_do(self, name: Any, theta: float, m: float, value: float, slope: float) -> None:
        cosine = torch.tensor([math.cos(theta)], dtype=torch.float64, requires_grad=True)
        found = margin_cosine(cosine, angular_margin=m, beyond_pi=name)
        assert float(found.detach()) == pytest.approx(value, rel=EXACT)
        assert float(torch.autograd.grad(found.sum(), cosine)[0]) == pytest.approx(slope, rel=1e-11)

    def test_loss_on_both_backends(self, backend: str) -> None:
        label, m = 2, 1.2  # θ = 2.2, θ + m = 3.4 > π
        expected = by_hand(lambda t: SCALE * (-2 - math.cos(t + m)), label)
        assert loss(label, angular_margin=m) == pytest.approx(expected, rel=EXACT)
        expected = by_hand(lambda t: SCALE * (math.cos(t) - m * math.sin(m)), label)
        assert loss(label, angular_margin=m, beyond_pi="arcface") == pytest.approx(expected, rel=EXACT)
        for name, margin_of in (("cosine", lambda t: math.cos(t + m)), ("clip", lambda t: -1.0), ("easy", math.cos)):
            expected = by_hand(lambda t, margin_of=margin_of: SCALE * margin_of(t), label)  # type: ignore[misc]
            assert loss(label, angular_margin=m, beyond_pi=name) == pytest.approx(expected, rel=EXACT)

    @pytest.mark.parametrize(("m1", "m2"), [(1.0, 0.5), (1.0, 2.0), (3.0, 0.0), (1.5, 0.7)])
    def test_monotone_falls_over_the_whole_circle(self, m1: float, m2: float) -> None:
        theta = torch.linspace(1e-3, math.pi - 1e-3, 4001, dtype=torch.float64)
        cosine = theta.cos().requires_grad_()
        value = margin_cosine(cosine, angle_multiplier=m1, angular_margin=m2)
        assert bool((value[1:] < value[:-1]).all())
        (slope,) = torch.autograd.grad(value.sum(), cosine)
        assert bool((slope >= 0).all())

    @pytest.mark.parametrize(("m1", "m2", "crossing"), [(1.0, 0.5, 1), (3.0, 0.0, 1), (3.0, 0.0, 2)])
    def test_value_and_slope_are_continuous(self, m1: float, m2: float, crossing: int) -> None:
        at = (crossing * math.pi - m2) / m1
        cosine = torch.tensor([math.cos(at - 1e-7), math.cos(at + 1e-7)], dtype=torch.float64, requires_grad=True)
        value = margin_cosine(cosine, angle_multiplier=m1, angular_margin=m2)
        (slope,) = torch.autograd.grad(value.sum(), cosine)
        # Over 2e-7 radians both move by at most m1²·2e-7 if they are continuous; a jump would be of order 1.
        assert float((value[0] - value[1]).detach().abs()) < 2e-6
        assert float((slope[0] - slope[1]).abs()) < 2e-5

    def test_sphereface_stretches(self) -> None:
        """(−1)^k cos(3θ) − 2k on the k-th stretch of length π."""
        for theta, k in ((0.5, 0), (1.5, 1), (2.5, 2)):
            got = margin_cosine(torch.tensor([math.cos(theta)], dtype=torch.float64), angle_multiplier=3.0)
            assert float(got) == pytest.approx((-1) ** k * math.cos(3 * theta) - 2 * k, rel=1e-13)


class TestMarginGradient:
    def slope(self, theta: float, **options: object) -> float:
        cosine = torch.tensor([math.cos(theta)], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(margin_cosine(cosine, **options).sum(), cosine)
        return float(slope)

    def test_exact(self) -> None:
        """d cos(m1·θ + m2) / d cos θ = m1·sin(m1·θ + m2)/sin θ."""
        expected = 1.2 * math.sin(1.2 * 0.9 + 0.4) / math.sin(0.9)
        assert self.slope(0.9, angle_multiplier=1.2, angular_margin=0.4) == pytest.approx(expected, rel=EXACT)

    def test_exact_beyond_pi(self) -> None:
        assert self.slope(3.0, angular_margin=0.5) == pytest.approx(-math.sin(3.5) / math.sin(3.0), rel=1e-13)
        assert self.slope(3.0, angular_margin=0.5, beyond_pi="arcface") == 1.0

    def test_straight_through(self, backend: str) -> None:
        """d margin / d cos = 1."""
        assert self.slope(0.9, angular_margin=0.4, margin_gradient="straight_through") == 1.0
        # In the loss: dL/dx = −p·s·(d cos/dx) with 1 − P from the value with the margin.
        from ltloss.testing import Problem

        given = Problem(on_circle(FEATURE), on_circle(0.0, 1.0), torch.tensor([0]))
        got = outcome(given, scale=SCALE, angular_margin=0.4, margin_gradient="straight_through").features[0]
        z = SCALE * math.cos(FEATURE + 0.4) - SCALE * math.cos(FEATURE - 1.0)
        wrong = 1 / (1 + math.exp(z))
        along = wrong * SCALE * (math.sin(FEATURE) - math.sin(FEATURE - 1.0))  # dL/dφ of the feature's angle
        tangent = (-math.sin(FEATURE), math.cos(FEATURE))
        assert got.tolist() == pytest.approx([along * t for t in tangent], rel=1e-13)

    def test_slope_is_bounded_where_the_cosine_is_one(self) -> None:
        """Exact derivative clamped at the angle 2^-11, which bounds it by 2048 at a margin near π/2."""
        assert self.slope(0.0, angular_margin=0.5) == pytest.approx(
            math.sin(ANGLE_FLOOR + 0.5) / math.sin(ANGLE_FLOOR), rel=1e-12
        )
        assert self.slope(0.0, angular_margin=math.pi / 2) <= 2048


class TestMinimumAngle:
    """L2 = −Σ_i ω_i · min_{j≠i} arccos(ŵ_i·ŵ_j), ω_i = n_i^(−1/k) / Σ_j n_j^(−1/k)."""

    def test_weighted(self, backend: str) -> None:
        omega = [n**-0.25 for n in (1, 16, 81)]
        nearest = (1.0, 1.0, 1.5)  # of the prototypes at 0, 1 and 2.5
        expected = -sum(o * a for o, a in zip(omega, nearest, strict=True)) / sum(omega)
        w = on_circle(*PROTOTYPES, length=3.0)
        assert float(min_angle_regularizer(w, torch.tensor([1, 16, 81]))) == pytest.approx(expected, rel=EXACT)

    def test_uniform_power_and_rows(self, backend: str) -> None:
        w, counts = on_circle(*PROTOTYPES), torch.tensor([4, 1, 9])
        assert float(min_angle_regularizer(w)) == pytest.approx(-3.5 / 3, rel=EXACT)
        expected = -(1.0 / 2 + 1.5 / 3) / (1 / 2 + 1 / 3)
        got = min_angle_regularizer(w, counts, count_exponent=0.5, classes=torch.tensor([0, 2]))
        assert float(got) == pytest.approx(expected, rel=EXACT)

    def test_nearest(self, backend: str) -> None:
        cosine, index = nearest_prototype(on_circle(*PROTOTYPES, length=2.0))
        assert index.tolist() == [1, 0, 1]
        assert cosine.tolist() == pytest.approx([math.cos(1), math.cos(1), math.cos(1.5)], rel=1e-13)


@pytest.mark.parametrize(
    ("kind", "g"),
    [
        ("inverse", lambda r: 1 / r),
        ("magface", lambda r: 1 / r + r / 9.0),
        ("ring", lambda r: (r - 3.0) ** 2),
        ("hinge", lambda r: max(0.0, 3.0 - r)),
        ("neglog", lambda r: -math.log(r)),
    ],
)
def test_feature_length(kind: str, g: Callable[[float], float], backend: str) -> None:
    """L3 = (1/N) Σ_i g(‖x_i‖), with R = u = 3."""
    x = torch.tensor([[3.0, 4.0], [0.6, 0.8]], dtype=torch.float64)
    got = feature_norm_penalty(x, kind, radius=3.0)
    assert float(got) == pytest.approx((g(5.0) + g(1.0)) / 2, rel=EXACT)
    callable_g = feature_norm_penalty(x, lambda r: r**3)
    assert float(callable_g) == pytest.approx((125 + 1) / 2, rel=EXACT)


def test_long_tail_loss_is_the_weighted_sum(backend: str) -> None:
    """L = L1 + λ1·L2 + λ2·L3, every part by hand."""
    module = LongTailLoss.from_counts(
        [81, 16, 1],
        2,
        scale=SCALE,
        margin=0.4,
        min_angle_weight=0.3,
        feature_norm_weight=0.2,
        feature_norm="inverse",
        dtype=torch.float64,
    )
    module.weight.data = on_circle(*PROTOTYPES)
    total = module(on_circle(FEATURE, length=2.0), torch.tensor([1])).item()
    l1 = by_hand(lambda t: SCALE * math.cos(t + 0.2), 1)
    omega = (1 / 3, 1 / 2, 1.0)
    l2 = -(omega[0] * 1.0 + omega[1] * 1.0 + omega[2] * 1.5) / sum(omega)
    parts = {name: float(value) for name, value in module.terms.items()}
    # 1e-7: the module keeps its margins in float32
    assert parts == pytest.approx({"margin_cross_entropy": l1, "min_angle": l2, "feature_norm": 0.5}, rel=1e-7)
    assert total == pytest.approx(l1 + 0.3 * l2 + 0.2 * 0.5, rel=1e-7)


def test_deferred_weights_by_hand() -> None:
    """DRW: loss × weight_y from an epoch on."""
    schedule = DeferredWeights(torch.tensor([0.5, 2.0, 3.0]), start_epoch=5)
    module = LDAMLoss.from_counts([256, 16, 1], 2, scale=SCALE, max_margin=0.5, reduction="sum", dtype=torch.float64)
    module.weight.data = on_circle(*PROTOTYPES)
    plain = by_hand(lambda t: SCALE * (math.cos(t) - 0.25), 1)
    for epoch, factor in ((0, 1.0), (4, 1.0), (5, 2.0), (9, 2.0)):
        module.set_class_weight(schedule(epoch))
        got = float(module(on_circle(FEATURE), torch.tensor([1])))
        assert got == pytest.approx(factor * plain, rel=1e-7)  # float32 margins


def test_public_functions_are_the_ones_tested() -> None:
    assert set(functional.__all__) == {
        "cosine_logsumexp",
        "feature_norm_penalty",
        "margin_cross_entropy",
        "min_angle_regularizer",
        "nearest_prototype",
        "top_k",
    }


def test_a_negative_angular_margin_is_a_plain_cosine() -> None:
    """cos(m1·θ + m2) for every m2: only beyond π is the cosine replaced, not below 0."""
    got = margin_cosine(
        torch.ones(2, dtype=torch.float64), angular_margin=torch.tensor([-0.5, 0.5], dtype=torch.float64)
    )
    assert got.tolist() == pytest.approx([math.cos(0.5)] * 2, rel=1e-12)
