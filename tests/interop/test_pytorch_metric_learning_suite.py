"""What the unit tests of pytorch-metric-learning check of these losses, written anew and named as there.

Each runs with the losses of ltloss.interop in their place and, where that package is installed, with its own. Expected
values are dense and in float64. Two things of theirs are left out: statistics, which are not kept here, and
``LogitGetter``, which version 2.9 does not have.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss.interop import pytorch_metric_learning as ours
from ltloss.interop._pytorch_metric_learning import ClassificationLoss

CLASSES = 10
DTYPES = (torch.float16, torch.float32, torch.float64)
TOLERANCE = {torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-9}
ALL = (
    "ArcFaceLoss",
    "CosFaceLoss",
    "NormalizedSoftmaxLoss",
    "SphereFaceLoss",
    "LargeMarginSoftmaxLoss",
    "SubCenterArcFaceLoss",
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # of theirs, with NumPy 2


@pytest.fixture(params=["ltloss", "pytorch_metric_learning"])
def losses(request: pytest.FixtureRequest) -> Any:
    if request.param == "ltloss":
        return ours
    return pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")


@pytest.fixture(scope="module")
def parts() -> Any:
    """Their regularisers, reducers and miners, which either loss takes."""
    package = "pytorch_metric_learning"
    pytest.importorskip(package, reason="pytorch-metric-learning is not installed")
    names = ("distances", "losses", "miners", "reducers", "regularizers", "utils.loss_and_miner_utils")
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(f"{package}.{name}") for name in names})


def half_circle(dtype: torch.dtype, length: float = 1.0) -> tuple[Tensor, Tensor]:
    """Embeddings at 0° to 179°, and a class for each."""
    angles = torch.arange(180, dtype=torch.float64) * (math.pi / 180)
    embeddings = (length * torch.stack([angles.cos(), angles.sin()], dim=1)).to(dtype)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (180,))


def backward(loss_fn: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The loss, once its gradients are there, finite and not zero."""
    loss = loss_fn(embeddings, labels)
    loss.backward()
    theirs, name = not isinstance(loss_fn, ClassificationLoss), type(loss_fn).__name__
    at_the_end = theirs and name.endswith("ArcFaceLoss") and loss_fn.W.dtype != torch.float64  # at cosines of ±1
    for leaf in (embeddings, loss_fn.W):
        assert bool(leaf.grad.isfinite().all()) or at_the_end
        assert bool(leaf.grad.any())
    return loss.detach().double()


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the dtype, of the largest value."""
    error = float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())
    assert error <= TOLERANCE[dtype], error


def in_float64(loss_fn: Any, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, D), W (D, C) and their cosines (N, C)."""
    x, w = embeddings.detach().double(), loss_fn.W.detach().double()
    return x, w, (F.normalize(x) @ F.normalize(w, dim=0)).clamp(-1.0, 1.0)


def with_target(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The logits (N, C), those of the targets replaced by (N, C) others."""
    return torch.where(F.one_hot(labels, CLASSES).bool(), target, logits)


def of_30_degrees(cosines: Tensor) -> Tensor:
    """ArcFace's cos(θ + m), and beyond π a line."""
    margin, angles = math.pi / 6, cosines.acos()
    return torch.where(angles + margin <= math.pi, (angles + margin).cos(), cosines - margin * math.sin(margin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arcface_loss(losses: ModuleType, dtype: torch.dtype) -> None:
    loss_fn = losses.ArcFaceLoss(margin=30, scale=64, num_classes=CLASSES, embedding_size=2)
    embeddings, labels = half_circle(dtype)
    found = backward(loss_fn, embeddings, labels)
    _, _, cosines = in_float64(loss_fn, embeddings)
    close(found, F.cross_entropy(64 * with_target(cosines, labels, of_30_degrees(cosines)), labels), dtype)
    close(loss_fn.get_logits(embeddings), 64 * cosines, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sub_center_arcface_loss(losses: ModuleType, dtype: torch.dtype) -> None:
    """The nearest of three sub-centres, which stand side by side."""
    given = {"num_classes": CLASSES, "embedding_size": 2, "sub_centers": 3}
    loss_fn = losses.SubCenterArcFaceLoss(margin=30, scale=64, **given)
    embeddings, labels = half_circle(dtype)
    found = backward(loss_fn, embeddings, labels)
    cosines = in_float64(loss_fn, embeddings)[2].view(-1, CLASSES, 3).amax(2)
    close(found, F.cross_entropy(64 * with_target(cosines, labels, of_30_degrees(cosines)), labels), dtype)
    close(loss_fn.get_logits(embeddings), 64 * cosines, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosface_loss(losses: ModuleType, dtype: torch.dtype) -> None:
    loss_fn = losses.CosFaceLoss(margin=0.5, scale=64, num_classes=CLASSES, embedding_size=2)
    embeddings, labels = half_circle(dtype)
    found = backward(loss_fn, embeddings, labels)
    _, _, cosines = in_float64(loss_fn, embeddings)
    close(found, F.cross_entropy(64 * with_target(cosines, labels, cosines - 0.5), labels), dtype)
    close(loss_fn.get_logits(embeddings), 64 * cosines, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_softmax_loss(losses: ModuleType, parts: Any, dtype: torch.dtype) -> None:
    """With a distance that keeps the length of the embeddings, here 3."""
    distance = parts.distances.DotProductSimilarity(normalize_embeddings=False)
    loss_fn = losses.NormalizedSoftmaxLoss(temperature=0.1, num_classes=CLASSES, embedding_size=2, distance=distance)
    embeddings, labels = half_circle(dtype, length=3.0)
    found = backward(loss_fn, embeddings, labels)
    _, _, cosines = in_float64(loss_fn, embeddings)
    close(found, F.cross_entropy(30 * cosines, labels), dtype)
    close(loss_fn.get_logits(embeddings), 30 * cosines, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # at a margin of 10 half precision has no digits left
@pytest.mark.parametrize("name", ["LargeMarginSoftmaxLoss", "SphereFaceLoss"])
def test_large_margin_softmax_and_sphereface_loss(losses: ModuleType, name: str, dtype: torch.dtype) -> None:
    """By de Moivre's formula for cos 10·θ; equation 6 of the paper says where it is turned."""
    margin, scale = 10, 2
    loss_fn = getattr(losses, name)(margin=margin, scale=scale, num_classes=CLASSES, embedding_size=2)
    embeddings, labels = half_circle(dtype, length=10.0)
    found = backward(loss_fn, embeddings, labels)
    x, w, cosines = in_float64(loss_fn, embeddings)
    lengths = scale * x.norm(dim=1, keepdim=True) * (w.norm(dim=0) if name == "LargeMarginSoftmaxLoss" else 1.0)
    powers = [
        (-1) ** n * math.comb(margin, 2 * n) * cosines ** (margin - 2 * n) * (1 - cosines**2) ** n
        for n in range(margin // 2 + 1)
    ]
    k = (cosines.acos() * margin / math.pi).floor()
    target = (-1) ** k * sum(powers) - 2 * k
    close(found, F.cross_entropy(lengths * with_target(cosines, labels, target), labels), dtype)
    close(loss_fn.get_logits(embeddings), lengths * cosines, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_backward(losses: ModuleType, name: str, dtype: torch.dtype) -> None:
    options = {"margin": 10, "scale": 2} if name in ALL[3:] else {}
    loss_fn = getattr(losses, name)(num_classes=CLASSES, embedding_size=2, **options)
    backward(loss_fn, *half_circle(dtype, length=10.0))


def regularisation(name: str, w: Tensor) -> Tensor:
    """Of prototypes (C, D): the mean square deviation of ‖w‖² over 4, or the mean largest cosine to another one."""
    if name == "CenterInvariantRegularizer":
        squares = w.square().sum(dim=1)
        return (squares - squares.mean()).square().mean() / 4
    unit = F.normalize(w)
    return (unit @ unit.t()).fill_diagonal_(-2.0).amax(dim=1).mean()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("regularizer", ["CenterInvariantRegularizer", "RegularFaceRegularizer"])
@pytest.mark.parametrize("name", ALL)
def test_weight_regularizers(losses: ModuleType, parts: Any, name: str, regularizer: str, dtype: torch.dtype) -> None:
    """The loss grows by the weight times the regulariser, and W gets its gradient."""
    given = {"num_classes": CLASSES, "embedding_size": 64}
    one = getattr(losses, name)(
        **given, weight_regularizer=getattr(parts.regularizers, regularizer)(), weight_reg_weight=0.1
    )
    plain = getattr(losses, name)(**given)
    plain.load_state_dict(one.state_dict())
    embeddings, labels = F.normalize(torch.randn(180, 64, dtype=dtype)), torch.randint(CLASSES, (180,))
    found, without = (backward(loss_fn, embeddings.clone().requires_grad_(), labels) for loss_fn in (one, plain))
    w = one.W.detach().double().t().clone().requires_grad_()
    expected = 0.1 * regularisation(regularizer, w)
    close(found, without + expected, torch.float32)  # W stays in float32 here
    (grad,) = torch.autograd.grad(expected, w)
    close(one.W.grad.double() - plain.W.grad.double(), grad.t(), torch.float16)


@pytest.mark.parametrize("name", ALL)
def test_losses_without_labels(losses: ModuleType, parts: Any, name: str) -> None:
    """A ValueError, whatever pairs there are: these losses need classes."""
    embeddings, labels = torch.randn(64, 32), torch.randint(CLASSES, (64,))
    loss_fn = getattr(losses, name)(num_classes=CLASSES, embedding_size=32)
    for indices_tuple in (
        None,
        parts.loss_and_miner_utils.get_all_pairs_indices(labels),
        parts.miners.MultiSimilarityMiner()(embeddings, labels),
        parts.miners.TripletMarginMiner()(embeddings, labels),
    ):
        with pytest.raises(ValueError):
            loss_fn(embeddings, indices_tuple=indices_tuple)


def _reducers(reducers: Any, weights: Tensor) -> Iterator[Any]:
    yield reducers.MeanReducer()
    yield reducers.SumReducer()
    yield reducers.AvgNonZeroReducer()
    yield reducers.ThresholdReducer(low=0.1)
    yield reducers.ThresholdReducer(low=0.1, high=20.0)
    yield reducers.ClassWeightedReducer(weights)


@pytest.mark.parametrize("name", ALL)
def test_setting_reducers(losses: ModuleType, parts: Any, name: str) -> None:
    """The reducer that is given reduces the losses of the samples."""
    weights = torch.linspace(0.0, 2.0, CLASSES, dtype=torch.float64)
    embeddings, labels = half_circle(torch.float64)
    for reducer in _reducers(parts.reducers, weights):
        loss_fn = getattr(losses, name)(num_classes=CLASSES, embedding_size=2, reducer=reducer).double()
        assert type(loss_fn.reducer) is type(reducer)
        found = loss_fn(embeddings, labels)
        loss_fn.reducer = parts.reducers.DoNothingReducer()
        per_sample = loss_fn(embeddings, labels)["loss"]["losses"]
        kept = (per_sample > getattr(reducer, "low", 0.0)) & (per_sample < (getattr(reducer, "high", None) or math.inf))
        expected = {
            "SumReducer": per_sample.sum(),
            "MeanReducer": per_sample.mean(),
            "ClassWeightedReducer": (per_sample * weights[labels]).mean(),
        }.get(type(reducer).__name__, per_sample[kept].mean())
        close(found, expected, torch.float64)


def test_multiple_losses(losses: ModuleType, parts: Any) -> None:
    """Weighted sums of losses, by name or by place, with a miner of their own or with pairs that are given."""
    one, other = losses.ArcFaceLoss(CLASSES, 2), losses.NormalizedSoftmaxLoss(CLASSES, 2)
    miner, (embeddings, labels) = parts.miners.MultiSimilarityMiner(), half_circle(torch.float32)
    pairs = miner(embeddings, labels)
    together = parts.losses.MultipleLosses(
        losses={"one": one, "other": other}, weights={"one": 1, "other": 0.23}, miners={"other": miner}
    )
    expected = one(embeddings, labels) + 0.23 * other(embeddings, labels, pairs)
    torch.testing.assert_close(together(embeddings, labels), expected)
    together = parts.losses.MultipleLosses(losses=[one, other], weights=[1, 0.23])
    expected = one(embeddings, labels, pairs) + 0.23 * other(embeddings, labels, pairs)
    torch.testing.assert_close(together(embeddings, labels, pairs), expected)
    assert len(list(together.parameters())) == 2
