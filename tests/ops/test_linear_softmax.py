"""The softmax of a linear layer, and priors that learn, against torch's ``F.cross_entropy`` of ``F.linear``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.nn import functional as F

import ltloss
from ltloss import LinearSoftmaxLoss, reference
from ltloss.export import InferenceHead
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.functional import cosine_logsumexp, margin_cross_entropy, top_k
from ltloss.testing import check_loss, problem, relative_error

LINEAR: dict[str, Any] = {"normalize_features": False, "normalize_prototypes": False, "scale": 1.0}
# float64: sums of some ten products, with logits of size 5.
EXACT = 1e-13


def drawn(n: int = 7, c: int = 9, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Features, weights, bias and labels, of which the second is ignored; the first three ask for gradients."""
    features, weight, labels = problem(n, c, d)
    bias = torch.randn(c, dtype=torch.float64)
    features, weight, bias = (one.to(dtype).requires_grad_() for one in (features, weight, bias))
    return features, weight, bias, labels


def with_gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The value and its gradients; losses of samples get factors of either sign."""
    factors = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view(value.shape) if value.dim() else 1.0
    return value.detach(), *torch.autograd.grad((value * factors).sum(), leaves)


def assert_same(found: tuple[Tensor, ...], law: tuple[Tensor, ...], tolerance: float = EXACT) -> None:
    for one, other in zip(found, law, strict=True):
        assert relative_error(one, other) <= tolerance


WEIGHTS = torch.linspace(0.5, 2.5, 9, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_cross_entropy_of_a_linear_layer(
    smoothing: float, reduction: str, backend: str, tiny_blocks: object
) -> None:
    features, weight, bias, labels = drawn()
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    found = margin_cross_entropy(features, weight, labels, bias=bias, **LINEAR, **options)
    law = F.cross_entropy(F.linear(features, weight, bias), labels, **options)
    leaves = (features, weight, bias)
    assert_same(with_gradients(found, leaves), with_gradients(law, leaves))


def test_class_weights_and_a_prior_that_takes_a_class_out(backend: str, tiny_blocks: object) -> None:
    """The prior is balanced softmax; at −inf a class has no probability, and its bias no gradient."""
    features, weight, bias, labels = drawn()
    labels = torch.where(labels == 4, 5, labels)
    prior = torch.linspace(-3.0, 0.0, 9, dtype=torch.float64).index_fill(0, torch.tensor([4]), -math.inf)
    found = margin_cross_entropy(features, weight, labels, bias=bias, log_prior=prior, class_weight=WEIGHTS, **LINEAR)
    law = F.cross_entropy(F.linear(features, weight, bias) + prior, labels, weight=WEIGHTS)
    leaves = (features, weight, bias)
    results = with_gradients(found, leaves)
    assert_same(results, with_gradients(law, leaves))
    assert float(results[3][4]) == 0.0


def test_by_hand(backend: str) -> None:
    """Logits 2 and −1, of features that keep their length or do not."""
    x, w, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5, 0.0], [0.0, -0.5]]), torch.tensor([0.5, 1.0])
    b.requires_grad_()
    loss = margin_cross_entropy(x, w, torch.tensor([0]), bias=b, **LINEAR)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-1.0 - 2.0)), rel=1e-6)
    loss.backward()
    other = 1.0 / (1.0 + math.exp(3.0))
    assert b.grad.tolist() == pytest.approx([-other, other], rel=1e-6)
    # x̂ = (0.6, 0.8): logits 10·0.3 and 10·(−0.4).
    unit = margin_cross_entropy(x, w, torch.tensor([1]), scale=10.0, normalize_prototypes=False)
    assert float(unit) == pytest.approx(7.0 + math.log1p(math.exp(-7.0)), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_prototypes": False, "scale": 3.0, "label_smoothing": 0.2},
        {"angular_margin": 0.5, "label_smoothing": 0.1, "scale": 6.0},
        {"angular_margin": WEIGHTS / 4, "normalize_features": False, "scale": 2.0, "class_weight": WEIGHTS},
        {"angle_multiplier": 1.3, "beyond_pi": "clip", "angular_margin": 0.9, "scale": 5.0, "reduction": "sum"},
    ],
    ids=["unit features", "angle", "length", "clipped"],
)
def test_gradients_are_derivatives_also_of_a_learning_prior(
    options: dict[str, Any], backend: str, tiny_blocks: object
) -> None:
    """With a margin, what the prior of the target gets is not what its cosine gets."""
    features, weight, bias, labels = drawn()

    def loss(x: Tensor, w: Tensor, prior: Tensor, bias: Tensor) -> Tensor:
        return margin_cross_entropy(x, w, labels, log_prior=prior, bias=bias, **options)

    prior = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (features, weight, prior, bias))
    value = loss(features, weight, prior, bias)
    of_prior, of_bias = torch.autograd.grad(value, (prior, bias))
    assert torch.equal(of_prior, of_bias)


def test_the_extension_has_the_same_gradients(backend: str, tiny_blocks: object) -> None:
    features, weight, bias, labels = drawn()
    stats = logsumexp_stats(features, weight, labels, bias=bias, with_logit_sum=True, **LINEAR)
    losses = margin_losses(stats, label_smoothing=0.1)
    found = reduce_losses(losses, stats.labels)
    law = F.cross_entropy(F.linear(features, weight, bias), labels, label_smoothing=0.1)
    leaves = (features, weight, bias)
    assert_same(with_gradients(found, leaves), with_gradients(law, leaves))
    for margin in ({"cosine_margin": 0.1}, {"sample_cosine_margin": torch.zeros(7, dtype=torch.float64)}):
        with refused(*margin, "normalize_prototypes", "False"):
            margin_losses(stats, **margin)


def test_the_two_numbers_have_the_gradient_of_the_prior(backend: str) -> None:
    features, weight, labels = problem(ignored=False)
    prior = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64).requires_grad_()

    def both(prior: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_logsumexp(features, weight, labels, scale=5.0, log_prior=prior)

    assert torch.autograd.gradcheck(both, (prior,))


def test_rows_of_zeros_have_their_gradient(backend: str) -> None:
    """A linear layer may start at zero, and a feature be zero: products have a slope there, directions have none."""
    features, weight, bias, labels = drawn()
    with torch.no_grad():
        weight[3:] = 0.0
        features[4] = 0.0
        features[5] = 1e-42
    found = margin_cross_entropy(features, weight, labels, bias=bias, **LINEAR)
    law = F.cross_entropy(F.linear(features, weight, bias), labels)
    leaves = (features, weight, bias)
    assert_same(with_gradients(found, leaves), with_gradients(law, leaves))


def test_an_empty_batch_and_ignored_rows_of_nan(backend: str) -> None:
    features, weight, bias, labels = drawn()
    loss = margin_cross_entropy(features[:0], weight, labels[:0], bias=bias, **LINEAR)
    assert [float(one.abs().sum()) for one in with_gradients(loss, (features, weight, bias))] == [0.0] * 4
    padded = features.detach().clone()
    padded[1] = math.nan
    leaves = (padded.requires_grad_(), weight, bias)
    found = with_gradients(margin_cross_entropy(padded, weight, labels, bias=bias, **LINEAR), leaves)
    kept = labels >= 0
    law = F.cross_entropy(F.linear(features[kept], weight, bias), labels[kept])
    assert_same((found[0], found[1][kept], *found[2:]), _kept(with_gradients(law, (features, weight, bias)), kept))
    assert not found[1][1].any()


def _kept(results: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
    return results[0], results[1][kept], *results[2:]


def test_half_precision_and_a_bias_beside_it() -> None:
    features, weight, bias, labels = drawn(40, 30, 16, dtype=torch.bfloat16)
    wide = tuple(one.detach().double().requires_grad_() for one in (features, weight, bias))
    found = with_gradients(
        margin_cross_entropy(features, weight, labels, bias=bias, **LINEAR), (features, weight, bias)
    )
    law = with_gradients(F.cross_entropy(F.linear(*wide), labels), wide)
    assert found[0].dtype == torch.float32
    assert [one.dtype for one in found[1:]] == [torch.bfloat16] * 3
    assert_same(found[:1], law[:1], 1e-6)
    assert_same(found[1:], law[1:], 2.0**-8)  # each entry rounded once


def test_kept_exponentials_leave_the_loss_and_half_a_unit_of_the_gradients() -> None:
    features, weight, bias, labels = drawn(40, 30, 16, dtype=torch.float32)
    leaves = (features, weight, bias)
    with ltloss.use_workspace(1 << 30, keep_exponentials=True):
        found = with_gradients(margin_cross_entropy(features, weight, labels, bias=bias, **LINEAR), leaves)
    law = with_gradients(F.cross_entropy(F.linear(*leaves), labels), leaves)
    assert_same(found[:1], law[:1], 1e-6)
    assert_same(found[1:], law[1:], 2.0**-8)


def test_what_is_refused() -> None:
    features, weight, _, labels = drawn()
    with refused("normalize_prototypes", "float8_e4m3fn", error=TypeError):
        margin_cross_entropy(features.float(), weight.detach().to(torch.float8_e4m3fn), labels, **LINEAR)
    with refused("bias", "normalize_prototypes", "True"):
        top_k(features, weight, bias=torch.zeros(9))
    loss_fn = LinearSoftmaxLoss(9, 5)
    loss_fn.cosine_margin = 0.2
    with refused("cosine_margin", "0.2", "normalize_prototypes", "False"):
        loss_fn(features.float(), labels)
    with refused("scale", "LinearSoftmaxLoss", error=AttributeError):
        loss_fn.scale = 2.0
    with refused("dtype", "float8_e4m3fn", error=TypeError):
        LinearSoftmaxLoss(9, 5, dtype=torch.float8_e4m3fn)


class TestKernels:
    """Interpreted, in tiles that a small problem crosses many edges of."""

    @pytest.fixture(autouse=True)
    def kernels(self) -> Iterator[None]:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("interpreted only: tensors here are the CPU's")
        from helpers.interpreter import nearest_bfloat16, quick_interpreter
        from helpers.kernel_problems import tiny_tiles

        interpreted = quick_interpreter(), nearest_bfloat16(), tiny_tiles(), np.errstate(all="ignore")
        with contextlib.ExitStack() as stack:
            for context in (*interpreted, ltloss.use_backend("triton")):
                stack.enter_context(context)
            yield

    @pytest.mark.parametrize(
        ("dtype", "tolerance", "size"),
        [
            (torch.float32, 5e-6, 1.0),
            (torch.float16, 2.0**-9, 1.0),
            (torch.float16, 2.0**-9, 512.0),  # with the factor of its class a gradient of 1 would leave float16
            (torch.bfloat16, 2.0**-7, 1.0),
        ],
    )
    @pytest.mark.parametrize("width", [16, 19])  # prototypes read in place, and copied
    def test_linear_layer(self, width: int, dtype: torch.dtype, tolerance: float, size: float) -> None:
        features, weight, bias, labels = drawn(37, 70, width, dtype=dtype)
        with torch.no_grad():
            features /= size
            weight *= size
        leaves = (features, weight, bias)
        options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
        found = with_gradients(margin_cross_entropy(features, weight, labels, bias=bias, **LINEAR, **options), leaves)
        wide = tuple(one.detach().double().requires_grad_() for one in leaves)
        law = with_gradients(F.cross_entropy(F.linear(*wide), labels, **options), wide)
        assert_same(found, law, tolerance)

    def test_training_with_an_update_inside_the_backward(self) -> None:
        train_both()

    def test_the_extension(self) -> None:
        features, weight, prior, labels = drawn(37, 70, 16, dtype=torch.float32)

        def loss(x: Tensor, w: Tensor, prior: Tensor) -> Tensor:
            stats = logsumexp_stats(x, w, labels, scale=6.0, log_prior=prior, with_logit_sum=True)
            return margin_losses(stats, angular_margin=0.4, label_smoothing=0.1).sum()

        found = with_gradients(loss(features, weight, prior), (features, weight, prior))
        wide = tuple(one.detach().double().requires_grad_() for one in (features, weight, prior))
        with ltloss.use_backend("reference"):
            exact = with_gradients(loss(*wide), wide)
        assert_same(found, exact, 5e-6)

    @pytest.mark.parametrize("keep", [False, True])
    def test_a_prior_that_learns_under_a_margin(self, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several slabs of classes and chunks of samples, whose sums add up."""
        from ltloss_kernels import backward_pass
        from ltloss_kernels.config import chunking, tile_table

        plan = chunking.BackwardPlan(16, 32)
        monkeypatch.setattr(tile_table, "prototype_gradient_tile", lambda *_: None)
        monkeypatch.setattr(backward_pass, "backward_plan", lambda *_, **__: plan)
        features, weight, prior, labels = drawn(37, 70, 16, dtype=torch.float32)
        options: dict[str, Any] = {"angular_margin": 0.4, "label_smoothing": 0.1, "scale": 6.0}
        with ltloss.use_workspace(1 << 30, keep_exponentials=keep):
            loss = margin_cross_entropy(features, weight, labels, log_prior=prior, **options)
            found = with_gradients(loss, (features, weight, prior))
        wide = tuple(one.detach().double().requires_grad_() for one in (features, weight, prior))
        exact = reference.margin_cross_entropy(*wide[:2], labels, log_prior=wide[2], **options)
        assert_same(found, with_gradients(exact, wide), 2.0**-8 if keep else 5e-6)


class TestModule:
    def test_it_keeps_the_laws_of_every_loss(self) -> None:
        check_loss(lambda c, d: LinearSoftmaxLoss(c, d))

    def test_it_starts_as_a_linear_layer_does(self) -> None:
        torch.manual_seed(3)
        layer = torch.nn.Linear(5, 9)
        torch.manual_seed(3)
        head = LinearSoftmaxLoss(9, 5)
        assert torch.equal(head.weight, layer.weight)
        assert torch.equal(head.bias, layer.bias)
        assert LinearSoftmaxLoss(9, 5, bias=False).bias is None

    def test_logits_and_prediction_have_the_bias_and_no_prior(self, tiny_blocks: object) -> None:
        prior = torch.linspace(-5.0, 5.0, 9)
        head = LinearSoftmaxLoss(9, 5, log_prior=prior)
        features = problem(dtype=torch.float32)[0]
        logits = F.linear(features, head.weight, head.bias)
        torch.testing.assert_close(head.logits(features), logits)
        torch.testing.assert_close(InferenceHead(head)(features)["logits"], logits)
        found = head.predict(features, k=4)
        assert torch.equal(found.index, logits.topk(4).indices)
        expected = F.cosine_similarity(features[:, None], head.weight[found.index], dim=-1)
        torch.testing.assert_close(found.cosine, expected)
        with ltloss.use_backend("reference"):
            again = head.predict(features, k=4)
        assert torch.equal(again.index, found.index)

    def test_autocast_changes_no_prediction(self) -> None:
        head, features = LinearSoftmaxLoss(300, 16), torch.randn(200, 16)
        found = head.predict(features, k=3)
        with torch.autocast("cpu", torch.bfloat16):
            again = head.predict(features, k=3)
        assert all(map(torch.equal, again, found))

    def test_equal_logits_are_in_class_order(self) -> None:
        weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
        bias = torch.tensor([0.0, 0.0, 1.0, -1.0])
        found = top_k(torch.tensor([[1.0, 0.0]]), weight, 4, normalize_prototypes=False, bias=bias)
        assert found.index.tolist() == [[2, 0, 3, 1]]  # logits 1, 0, 2, 1


def train_both(steps: int = 4) -> None:
    """The weights move in the backward, the bias by an optimizer beside it: as if one of torch moved both."""
    ours, theirs = (LinearSoftmaxLoss(9, 5) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    fused, beside = ltloss.optim.PrototypeSGD(ours, **options), torch.optim.SGD([ours.bias], **options)
    together = torch.optim.SGD(theirs.parameters(), **options)
    for step in range(steps):
        features, _, labels = problem(dtype=torch.float32, seed=step)
        for optimizer in (fused, beside, together):
            optimizer.zero_grad()
        ours(features, labels).backward()
        F.cross_entropy(F.linear(features, theirs.weight, theirs.bias), labels).backward()
        for optimizer in (fused, beside, together):
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(one, other) <= 2e-6


def test_training_with_an_update_inside_the_backward(tiny_blocks: object) -> None:
    train_both()
