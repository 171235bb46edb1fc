"""Samples of several classes: one pass over the prototypes instead of one for each, beside the dense formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss import reference
from ltloss.extend import logsumexp_stats
from ltloss.optim import PrototypeSGD
from ltloss.runtime import Backend
from ltloss.soft_labels import soft_label_cross_entropy
from ltloss.testing import FAMILY, Outcome, assert_same, relative_error, watching

N, C, D = 20, 70, 13


def _given(k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    x, w, q = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (C, D), (N, k)))
    labels = torch.randint(C, (N, k), generator=generator)
    labels[1] = -100
    x[1] = math.nan
    if k > 1:
        labels[2, 1] = labels[2, 0]  # named twice
        labels[3, 1] = -100  # none
        labels[4, 0] = -100  # then the sample does not count
        x[4] = math.nan
    return x.to(dtype), w.to(dtype), labels, q.abs().to(dtype)


def _outcome(k: int, dtype: torch.dtype, loss: Any = soft_label_cross_entropy, **options: Any) -> Outcome:
    x, w, labels, q = _given(k, dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    options = {key: one.to(dtype) if isinstance(one, Tensor) else one for key, one in options.items()}
    value = loss(x, w, labels, q, **options)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=dtype).view(value.shape)
    return Outcome(value.detach(), *torch.autograd.grad((value * upstream).sum(), (x, w)))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("name", FAMILY)
def test_the_chunked_pass_against_a_pass_for_each(name: str, k: int) -> None:
    exact = _outcome(k, torch.float64, reference.soft_label_cross_entropy, **FAMILY[name](C))
    assert_same(_outcome(k, torch.float64, **FAMILY[name](C)), exact, 1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["arcface", "everything", "feature_length_smoothed", "linear", "per_sample"])
def test_the_kernels_against_a_pass_for_each(name: str, k: int) -> None:
    exact = _outcome(k, torch.float64, reference.soft_label_cross_entropy, **FAMILY[name](C))
    with ltloss.use_backend("triton"):
        assert_same(_outcome(k, torch.float32, **FAMILY[name](C)), exact, 1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)]
)
def test_prototypes_that_move_inside_the_backward(backend: Backend, dtype: torch.dtype, tolerance: float) -> None:
    """Three steps beside PyTorch's optimizer on the gradient of the dense formula in float64."""
    x, w, labels, q = _given(2)
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    exact = w.clone().requires_grad_()
    stored = torch.optim.SGD([exact], **settings)
    head = ltloss.ArcFaceLoss(C, D, scale=9.0, dtype=dtype)
    head.load_state_dict({"weight": w})
    fused = PrototypeSGD(head, **settings)
    for _ in range(3):
        stored.zero_grad()
        reference.soft_label_cross_entropy(x, exact, labels, q, scale=9.0, angular_margin=0.5).backward()
        stored.step()
        with ltloss.use_backend(backend):
            head(x.to(dtype).requires_grad_(), labels, label_weight=q.to(dtype)).backward()
        fused.step()
    assert relative_error(w, exact) > 1e-3, "it moved"
    assert relative_error(head.weight, exact) <= tolerance


def test_without_a_margin_it_is_pytorchs_cross_entropy_with_soft_targets() -> None:
    x, w, labels, q = _given(3)
    x, labels = x[5:], labels[5:]
    q = q[5:] / q[5:].sum(1, keepdim=True)
    targets = torch.zeros(len(x), C, dtype=x.dtype).scatter_add_(1, labels, q)
    expected = functional.cross_entropy(9.0 * functional.normalize(x) @ functional.normalize(w).t(), targets)
    torch.testing.assert_close(soft_label_cross_entropy(x, w, labels, q, scale=9.0), expected, rtol=1e-12, atol=0.0)


def test_by_hand() -> None:
    """Both targets at cosine √½, the third at 0: log(2·e^√2 + 1) - √2."""
    x, w = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    loss = soft_label_cross_entropy(x, w, torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]]), scale=2.0)
    root = math.sqrt(2.0)
    assert float(loss) == pytest.approx(math.log(2 * math.exp(root) + 1) - root, rel=1e-6)


def test_a_class_that_holds_all_of_a_sample_loses_no_digits() -> None:
    """The loss of 1e-9 comes from classes that would vanish beside the targets in a sum of all."""
    x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    stats = logsumexp_stats(x, w, torch.tensor([[0, 1]]), scale=30.0)
    assert float(stats.logsumexp) == -30.0
    assert stats.target_logit.tolist() == [[30.0, 30.0]]


class _Products(TorchDispatchMode):
    """Counts matrix products with all prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_it_is_one_pass() -> None:
    x, w, labels, q = _given(8, torch.float32)
    x.requires_grad_(), w.requires_grad_()
    with watching(_Products()) as seen:
        soft_label_cross_entropy(x, w, labels, q).backward()
    assert seen.count == 4  # one forwards, three backwards


def test_modules_take_weights_of_labels() -> None:
    x, _, labels, q = _given(2, torch.float32)
    q = q / q.sum(1, keepdim=True)
    counted = (labels != -100).all(1)
    x, labels, q = x[counted], labels[counted], q[counted]
    module = ltloss.LongTailLoss.from_counts(range(1, C + 1), D, min_angle_weight=0.2)
    found = module(x, labels, label_weight=q)
    other = ltloss.CombinedMarginLoss(C, D, angular_margin=module.angular_margin, scale=module.scale, reduction="none")
    other.load_state_dict({"weight": module.weight})
    expected = sum((q[:, j] * other(x, labels[:, j])).sum() for j in range(2)) / len(x)
    assert float(module.terms["margin_cross_entropy"]) == pytest.approx(float(expected), rel=1e-5)
    expected += 0.2 * module.terms["min_angle"] + module.feature_norm_weight * module.terms.get("feature_norm", 0.0)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_refusals() -> None:
    x, w, labels, q = _given(2, torch.float32)
    with refused("labels", "(N, k)", "(20,)"):
        soft_label_cross_entropy(x, w, labels[:, 0], q[:, 0])
    with refused("label_weight", "(20, 2)", "(20,)"):
        soft_label_cross_entropy(x, w, labels, q[:, 0])
    with refused("label_weight", "-1.0", "(7, 1)"):
        bad = q.clone()
        bad[7, 1] = -1
        soft_label_cross_entropy(x, w, labels, bad)
    with refused("label_weight", "detach"):
        soft_label_cross_entropy(x, w, labels, q.clone().requires_grad_())
    with refused("1", "8", "(20, 9)"):
        soft_label_cross_entropy(x, w, labels[:, :1].expand(-1, 9), q[:, :1].expand(-1, 9))
    with refused("angle", "angular_margin", error=TypeError):
        soft_label_cross_entropy(x, w, labels, q, angle=0.5)
    with refused("labels", "70", "[0, 70)", error=IndexError):
        soft_label_cross_entropy(x, w, labels.masked_fill(labels == labels[7, 1], C), q)
