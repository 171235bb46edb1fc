"""Any upstream gradient, any layout of the inputs, only the gradients that were asked for, and repeatability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss import reference
from ltloss.chunked import logsumexp
from ltloss.extend import reduce_losses
from ltloss.functional import cosine_logsumexp, margin_cross_entropy, min_angle_regularizer, nearest_prototype
from ltloss.sub_centers import dominant
from ltloss.testing import FAMILY, MODULES, Outcome, assert_same, long_tail_counts, outcome, problem, relative_error

EXACT = 1e-12  # float64, sums of some ten products times the scale

UPSTREAMS: dict[str, Callable[[int], Tensor]] = {
    "ones": lambda n: torch.ones(n),
    "random": lambda n: torch.randn(n),
    "negative": lambda n: -torch.rand(n) - 0.1,
    "strided": lambda n: torch.randn(2 * n)[::2],
    "column": lambda n: torch.randn(n, 3)[:, 1],
    "expanded": lambda n: torch.tensor(0.7).expand(n),  # stride 0, as .sum().backward() sends
    "some_zero": lambda n: torch.arange(n) % 2 * torch.randn(n),
    "all_zero": lambda n: torch.zeros(n),
    "huge_and_tiny": lambda n: 10.0 ** torch.linspace(-30, 30, n),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed"])
def test_any_upstream_gradient_per_row(name: str, upstream: str, tiny_blocks: object) -> None:
    given, options = problem(), FAMILY[name](9) | {"reduction": "none"}
    sent = UPSTREAMS[upstream](7).double()
    results = []
    for function in (margin_cross_entropy, reference.margin_cross_entropy):
        leaves = given.leaves()
        losses = function(*leaves, **options)
        losses.backward(sent)
        results.append(Outcome(losses.detach(), leaves.features.grad, leaves.prototypes.grad))
    assert_same(*results, EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1e20])
def test_any_upstream_gradient_of_a_scalar(reduction: str, factor: float) -> None:
    given = problem()
    options = {"angular_margin": 0.4, "reduction": reduction}
    ours, exact = (
        outcome(given, factor, loss=function, **options)
        for function in (margin_cross_entropy, reference.margin_cross_entropy)
    )
    assert_same(ours, exact, EXACT)


def test_sum_and_expand_send_the_same_gradient() -> None:
    grads = []
    for reduce in (lambda v: v.sum().backward(), lambda v: v.backward(torch.ones(()).double().expand(7))):
        leaves = problem().leaves()
        reduce(margin_cross_entropy(*leaves, reduction="none"))
        grads.append(leaves.prototypes.grad)
    assert torch.equal(*grads)


def test_each_output_alone(tiny_blocks: object) -> None:
    """r alone and t alone: the other upstream gradient is absent, not zero."""
    for pick in (0, 1):
        results = []
        for function in (cosine_logsumexp, reference.cosine_logsumexp):
            leaves = problem(ignored=False).leaves()
            function(*leaves, scale=7.0)[pick].sum().backward()
            results.append((leaves.features.grad, leaves.prototypes.grad))
        for ours, exact in zip(*results, strict=True):
            assert relative_error(ours, exact) <= EXACT


class _Recorder(TorchDispatchMode):
    """Notes what the operator of the backward is asked for, what it returns, and how often it projects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.needs: list[list[bool]] = []
        self.returned: list[tuple[int, ...]] = []
        self.projections = 0
        project = logsumexp.project_

        def counted(*args: Any) -> Tensor:
            self.projections += 1
            return project(*args)

        monkeypatch.setattr(logsumexp, "project_", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("ltloss::logsumexp_gradients"):
            self.needs.append(list(args[-1]))
            self.returned.append(tuple(tensor.numel() for tensor in result))
        return result


@pytest.mark.parametrize(
    ("needs", "numel", "projections"),
    [((True, False), (35, 0, 0), 1), ((False, True), (0, 45, 0), 1), ((True, True), (35, 45, 0), 2)],
)
def test_only_what_is_asked_for(
    needs: tuple[bool, bool], numel: tuple[int, int, int], projections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = _Recorder(monkeypatch)
    features, prototypes, labels = problem()
    full = outcome(problem())
    recorder.projections = 0
    with recorder:
        loss = margin_cross_entropy(features.requires_grad_(needs[0]), prototypes.requires_grad_(needs[1]), labels)
        loss.backward()
    assert recorder.needs == [[*needs, False]]
    assert recorder.returned == [numel]
    assert recorder.projections == projections  # 9 classes are one chunk
    for tensor, wanted, expected in zip((features, prototypes), needs, full[1:], strict=True):
        assert torch.equal(tensor.grad, expected) if wanted else tensor.grad is None


def test_nothing_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = problem().leaves()
    with _Recorder(monkeypatch) as recorder:
        with torch.no_grad():
            assert not margin_cross_entropy(*leaves).requires_grad
        with torch.inference_mode():
            assert not margin_cross_entropy(*leaves).requires_grad
        assert not margin_cross_entropy(*problem()).requires_grad
    assert recorder.needs == []


def test_repeated_backward_and_accumulation() -> None:
    leaves = problem().leaves()
    loss = margin_cross_entropy(*leaves, angular_margin=0.3)
    loss.backward(retain_graph=True)
    once = leaves.features.grad.clone(), leaves.prototypes.grad.clone()
    loss.backward()
    assert torch.equal(leaves.features.grad, 2 * once[0])
    assert torch.equal(leaves.prototypes.grad, 2 * once[1])
    with pytest.raises(RuntimeError):
        loss.backward()
    assert torch.equal(leaves.features.grad, 2 * once[0])


@pytest.mark.parametrize("name", ["cosine_softmax", "arcface", "feature_length"])
def test_double_backward_is_refused(name: str) -> None:
    features, prototypes, labels = problem().leaves()
    loss = margin_cross_entropy(features, prototypes, labels, **FAMILY[name](9))
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_double_backward_of_the_nearest_prototype() -> None:
    prototypes = problem().leaves().prototypes
    (grad,) = torch.autograd.grad(nearest_prototype(prototypes).cosine.sum(), prototypes, create_graph=True)
    with refused("nearest_prototype_gradient_torch", error=RuntimeError):
        grad.sum().backward()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_second_column": lambda t: torch.stack([t, -t], 2)[:, :, 0],
    "every_second_row": lambda t: torch.stack([t, -t], 1)[:, 0],
    "offset": lambda t: torch.cat([t.flatten().new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str, tiny_blocks: object) -> None:
    given, options = problem(), FAMILY["everything"](9)
    plain = outcome(given, **options)
    features, prototypes = (LAYOUTS[layout](t).requires_grad_() for t in given[:2])
    labels = torch.stack([given.labels, given.labels + 1], 1)[:, 0]
    loss = margin_cross_entropy(features, prototypes, labels, **options)
    assert_same(Outcome(loss, *torch.autograd.grad(loss, (features, prototypes))), plain, EXACT)


def test_expanded_features_and_vectors() -> None:
    row = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    prototypes, labels = problem().prototypes, torch.arange(7)
    margin = torch.tensor(0.3).expand(9)
    loss = margin_cross_entropy(row.expand(7, 5), prototypes, labels, angular_margin=margin)
    exact = reference.margin_cross_entropy(row.expand(7, 5), prototypes, labels, angular_margin=float(margin[0]))
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=EXACT)
    ours, dense = (torch.autograd.grad(value, row)[0] for value in (loss, exact))
    assert relative_error(ours, dense) <= EXACT


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_labels(dtype: torch.dtype, backend: str) -> None:
    given = problem()
    ignore_index = 255 if dtype == torch.uint8 else -100
    labels = given.labels.masked_fill(given.labels == -100, ignore_index).to(dtype)
    got = margin_cross_entropy(given.features, given.prototypes, labels, ignore_index=ignore_index)
    assert float(got) == float(margin_cross_entropy(*given))


def test_unsigned_labels_with_the_default_ignore_index(backend: str) -> None:
    """-100 is no uint8: it must not be taken for 156."""
    features, prototypes = torch.randn(2, 3), torch.randn(200, 3)
    labels = torch.tensor([156, 3], dtype=torch.uint8)
    got = margin_cross_entropy(features, prototypes, labels)
    assert float(got) == float(margin_cross_entropy(features, prototypes, labels.long()))
    with refused("labels", "[0, 100)", "156", "0", error=IndexError):
        margin_cross_entropy(features, prototypes[:100], labels)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_labels_whose_dtype_does_not_hold_the_number_of_classes(dtype: torch.dtype, backend: str) -> None:
    features, prototypes, labels = torch.randn(2, 3), torch.randn(300, 3), torch.tensor([127, 50])
    prior = torch.randn(300, requires_grad=True)

    def outcome(labels: torch.Tensor) -> torch.Tensor:
        loss = margin_cross_entropy(features, prototypes, labels, log_prior=prior, angular_margin=0.2)
        return torch.cat([loss.detach()[None], *torch.autograd.grad(loss, prior)])

    assert torch.equal(outcome(labels.to(dtype)), outcome(labels))
    for function in (
        lambda labels: dominant(torch.tensor([0, 1]), labels, 300, 2),
        lambda labels: reduce_losses(torch.ones(2), labels, class_weight=prior.detach()),
    ):
        assert torch.equal(function(labels.to(dtype)), function(labels))


HALF = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("feature_dtype", HALF)
@pytest.mark.parametrize("prototype_dtype", HALF)
def test_dtype_and_shape_of_what_comes_back(
    feature_dtype: torch.dtype, prototype_dtype: torch.dtype, backend: str
) -> None:
    """Statistics in float32, or float64 where an input has it; gradients in the dtype of their tensor."""
    given = problem()
    features = given.features.to(feature_dtype).requires_grad_()
    prototypes = given.prototypes.to(prototype_dtype).requires_grad_()
    wide = torch.float64 if torch.float64 in (feature_dtype, prototype_dtype) else torch.float32
    for reduction in ("mean", "none"):
        loss = margin_cross_entropy(features, prototypes, given.labels, reduction=reduction, label_smoothing=0.1)
        assert loss.dtype == wide
        for leaf, grad in zip(
            (features, prototypes), torch.autograd.grad(loss.sum(), (features, prototypes)), strict=True
        ):
            assert (grad.dtype, grad.shape, grad.layout) == (leaf.dtype, leaf.shape, leaf.layout)


@pytest.mark.usefixtures("default_algorithms")
class TestRepeatability:
    """Two identical calls agree bit for bit, under the default (not the deterministic) algorithms of PyTorch.

    The sizes pass the 32768 elements from which PyTorch uses several threads for one operator.
    """

    def repeated(self, function: Callable[[], tuple[Tensor, ...]], times: int = 9) -> None:
        first = function()
        for _ in range(times):
            for one, other in zip(first, function(), strict=True):
                assert torch.equal(one, other)

    def test_margin_cross_entropy(self) -> None:
        given = problem(200, 5300, 64, dtype=torch.float32)
        self.repeated(lambda: outcome(given, angular_margin=0.5, label_smoothing=0.1), times=3)

    def test_nearest_neighbour_shared_by_all(self) -> None:
        # All prototypes have the last one as their nearest: every pair adds into the same row of the gradient.
        prototypes = torch.randn(1500, 256) / 16
        prototypes[:, 0] = 1.0
        prototypes[-1] = 3.0 * torch.eye(256)[0]
        counts = long_tail_counts(1500)

        def regularizer() -> tuple[Tensor, ...]:
            leaf = prototypes.clone().requires_grad_()
            value = min_angle_regularizer(leaf, counts)
            value.backward()
            return value.detach(), leaf.grad

        assert int((nearest_prototype(prototypes).index == 1499).sum()) > 1400
        self.repeated(regularizer)

    @pytest.mark.parametrize("update", ["mean", "ema"])
    def test_centres(self, update: str) -> None:
        features, labels = torch.randn(4000, 64), torch.randint(3, (4000,))

        def centers() -> tuple[Tensor, ...]:
            module = ltloss.ClassCenters(3, 64, update=update)
            module.update(features, labels)
            return module.centers, module.counts

        self.repeated(centers)

    @pytest.mark.parametrize("name", MODULES)
    def test_modules(self, name: str) -> None:
        module = MODULES[name](50, 16)
        state = {key: value.clone() for key, value in module.state_dict().items()}
        features, labels = torch.randn(400, 16), torch.randint(50, (400,))

        def step() -> tuple[Tensor, ...]:
            module.load_state_dict(state)
            module.zero_grad()
            leaf = features.clone().requires_grad_()
            loss = module(leaf, labels)
            loss.backward()
            return loss.detach(), leaf.grad, module.weight.grad

        self.repeated(step, times=3)
