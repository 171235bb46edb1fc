"""The losses of pytorch-metric-learning over ours: beside theirs, where it is installed, and beside their formulas."""

from __future__ import annotations

import copy
import importlib
import io
import math
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor
from torch.nn import functional as F

from ltloss import functional
from ltloss.interop import pytorch_metric_learning as ours
from ltloss.testing import relative_error

CONFIGURATIONS = 200
Options = dict[str, Any]
Draw = Callable[[random.Random], Options]

LOSSES: dict[str, Draw] = {
    "ArcFaceLoss": lambda r: {"margin": r.choice([28.6, r.uniform(-60.0, 175.0)]), "scale": r.choice([64, 10.5])},
    "CosFaceLoss": lambda r: {"margin": r.choice([0.35, r.uniform(-0.5, 1.5)]), "scale": r.choice([64, 10.5])},
    "NormalizedSoftmaxLoss": lambda r: {"temperature": r.choice([0.05, r.uniform(0.02, 1.0)])},
    "SphereFaceLoss": lambda r: {"margin": r.choice([4, 1, 2, 3, 5]), "scale": r.choice([1, 0.3])},
    "LargeMarginSoftmaxLoss": lambda r: {"margin": r.choice([4, 1, 2, 3, 5]), "scale": r.choice([1, 0.3])},
    "SubCenterArcFaceLoss": lambda r: LOSSES["ArcFaceLoss"](r) | {"sub_centers": r.randint(1, 8)},
}


def _lengths(vectors: Tensor) -> Tensor:
    """A regulariser: any function of the rows."""
    return (vectors.norm(dim=1) - 1.0).square().mean()


class Case:
    """A batch, weights of a miner and options, all drawn from one seed."""

    def __init__(self, name: str, seed: int) -> None:
        r, generator = random.Random(f"{name} {seed}"), torch.Generator().manual_seed(seed)
        n, self.classes, self.width = r.randint(1, 8), r.randint(1, 12), r.randint(2, 8)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embeddings, self.W = r.choice([0.3, 1.0, 3.0]) * drawn(n, self.width), drawn(self.width, self.classes)
        self.labels = torch.randint(self.classes, (n,), generator=generator)
        pairs = tuple(torch.randint(n, (length,), generator=generator) for length in (5, 5, 3, 3))
        self.indices_tuple = r.choice([None, None, pairs, pairs[:3], (torch.empty(0, dtype=torch.int64),) * 3])
        self.options = LOSSES[name](r)
        if "sub_centers" in self.options:
            self.W = drawn(self.width, self.classes * self.options["sub_centers"])
        for part in r.sample(["weight", "embedding"], k=r.choice([0, 0, 1, 2])):
            self.options |= {f"{part}_regularizer": _lengths, f"{part}_reg_weight": r.choice([1, 0.2])}
        self.reducer = r.choice([None, "MeanReducer", "ThresholdReducer"])
        self.dot_product = name == "NormalizedSoftmaxLoss" and r.random() < 0.3

    def outcome(self, loss_fn: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, gradients, and logits."""
        loss_fn.double().load_state_dict({"W": self.W})
        embeddings = self.embeddings.clone().requires_grad_()
        loss = loss_fn(embeddings, self.labels, self.indices_tuple)
        grads = torch.autograd.grad(loss, (embeddings, loss_fn.W), materialize_grads=True)
        return loss.detach(), *grads, loss_fn.get_logits(embeddings).detach()


@pytest.fixture(scope="module")
def theirs() -> Any:
    package = "pytorch_metric_learning"
    pytest.importorskip(package, reason="pytorch-metric-learning is not installed")
    return SimpleNamespace(**{part: importlib.import_module(f"{package}.{part}") for part in PARTS})


PARTS = ("losses", "reducers", "distances", "miners", "regularizers")


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of theirs, with NumPy 2
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_theirs(theirs: Any, name: str) -> None:
    """The worst of the 1200 configurations is 8e-13: near θ = 0 and π the slope of an arccos multiplies a rounding."""
    for seed in range(CONFIGURATIONS):
        case = Case(name, seed)
        options = dict(case.options)
        if case.reducer:
            given = {"low": 0.1} if case.reducer == "ThresholdReducer" else {}
            options["reducer"] = getattr(theirs.reducers, case.reducer)(**given)
        if case.dot_product:
            options["distance"] = theirs.distances.DotProductSimilarity(normalize_embeddings=False)
        options |= {"num_classes": case.classes, "embedding_size": case.width}
        pair = (getattr(module, name)(**options) for module in (ours, theirs.losses))
        found, expected = (case.outcome(loss_fn) for loss_fn in pair)
        for what, one, other in zip(("loss", "d embeddings", "d W", "logits"), found, expected, strict=True):
            error = relative_error(one, other, smallest_size=1.0)
            assert error <= 2e-12, f"{what} of configuration {seed}, {case.options}: {error:.1e}"


@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.parametrize("name", LOSSES)
def test_one_takes_the_place_of_the_other(theirs: Any, name: str) -> None:
    """The same seed draws the same ``W``, and a state_dict goes either way; a miner's tuples do too."""
    pair = []
    for module in (ours, theirs.losses):
        torch.manual_seed(0)
        options = {"num_classes": 7, "embedding_size": 20, "weight_init_func": torch.nn.init.xavier_uniform_}
        pair.append(getattr(module, name)(**options))
    one, other = pair
    assert torch.equal(one.W, other.W)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict({"W": torch.zeros_like(other.W)})
    other.load_state_dict(torch.load(file))
    one.load_state_dict(other.state_dict())
    embeddings, labels = torch.randn(12, 20), torch.arange(12) % 4
    mined = theirs.miners.BatchHardMiner()(embeddings, labels)
    torch.testing.assert_close(one(embeddings, labels, mined), other(embeddings, labels, mined))


def _value(loss: Tensor) -> float:
    return float(loss.detach())


def _stated(loss: Any) -> Any:
    """A loss; or the parts of one that nothing reduced, without the word that tells what they are."""
    if isinstance(loss, Tensor):
        return loss
    return {name: (part["losses"], part["indices"]) for name, part in loss.items()}


def test_their_reducers_regularisers_and_distances(theirs: Any) -> None:
    embeddings, labels = torch.randn(6, 5), torch.arange(6) % 3
    options = {
        "weight_regularizer": theirs.regularizers.RegularFaceRegularizer(),
        "embedding_regularizer": theirs.regularizers.LpRegularizer(),
        "distance": theirs.distances.CosineSimilarity(),
    }
    mean, nothing = theirs.reducers.MeanReducer, theirs.reducers.DoNothingReducer
    several = theirs.reducers.MultipleReducers({"loss": theirs.reducers.ThresholdReducer(low=5.0)}, mean())
    for reducer in (None, several, nothing()):
        one, other = (module.CosFaceLoss(3, 5, reducer=reducer, **options) for module in (ours, theirs.losses))
        one.load_state_dict(other.state_dict())
        found, expected = (_stated(loss_fn(embeddings, labels)) for loss_fn in (one, other))
        torch.testing.assert_close(found, expected)
    dot = theirs.distances.DotProductSimilarity
    for distance in (theirs.distances.LpDistance(), theirs.distances.CosineSimilarity(power=2), dot(p=1), dot(power=3)):
        for loss in (ours.ArcFaceLoss, ours.NormalizedSoftmaxLoss):
            with refused("distance", type(distance).__name__):
                loss(3, 5, distance=distance)
    with refused("distance", "DotProductSimilarity", "normalize_embeddings=False"):
        ours.CosFaceLoss(3, 5, distance=dot(normalize_embeddings=False))


def test_outliers_and_dominant_centers_are_theirs(theirs: Any) -> None:
    """A class without samples has no dominant centre there, but memory that nobody wrote."""
    for seed in range(CONFIGURATIONS):
        case = Case("SubCenterArcFaceLoss", seed)
        sizes = {"num_classes": case.classes, "embedding_size": case.width}
        pair = [
            module.SubCenterArcFaceLoss(**sizes, sub_centers=case.options["sub_centers"]).double()
            for module in (ours, theirs.losses)
        ]
        found: list[Any] = []
        for loss_fn in pair:
            loss_fn.load_state_dict({"W": case.W})
            found.append([loss_fn.get_outliers(case.embeddings, case.labels, angle) for angle in (30, 75, 120.5)])
        seen = case.labels.unique()
        for (index, centers), (their_index, their_centers) in zip(*found, strict=True):
            assert index.tolist() == their_index.tolist()
            assert torch.equal(centers[:, seen], their_centers[:, seen])


def test_outliers_by_hand() -> None:
    """Three samples of class 1 along x and one along y; class 0 has none, and the last sample has no class."""
    loss_fn = ours.SubCenterArcFaceLoss(2, 2, sub_centers=2)
    loss_fn.load_state_dict({"W": torch.tensor([[5.0, 6.0, 0.0, 3.0], [7.0, 8.0, 1.0, 0.0]])})
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.1], [1.0, 0.9], [0.0, 1.0]])
    labels = torch.tensor([1, 1, 1, 1, -100])
    for threshold, expected in ((75, [1]), (40, [1, 3]), (100, [])):
        outliers, centers = loss_fn.get_outliers(embeddings, labels, threshold, return_dominant_centers=False)
        assert outliers.tolist() == expected
        assert centers.tolist() == [[5.0, 3.0], [7.0, 0.0]]
    with refused("threshold", "181"):
        loss_fn.get_outliers(embeddings, labels, threshold=181)


def test_what_differs(theirs: Any) -> None:
    """A loss of e^-41 is none to them; an embedding of zeros is one that they divide by."""
    embeddings, labels = torch.eye(2), torch.tensor([0, 0])
    for module, mean in ((ours, 86.4 / 2), (theirs.losses, 86.4)):
        reducer = theirs.reducers.AvgNonZeroReducer()
        loss_fn = module.CosFaceLoss(2, 2, reducer=reducer, weight_init_func=torch.nn.init.eye_)
        assert _value(loss_fn(embeddings, labels)) == pytest.approx(mean)
        zero = torch.zeros(1, 2, requires_grad=True)
        loss_fn(zero, labels[:1]).backward()
        assert bool((zero.grad.abs() > 1e12).any()) == (module is not ours)
    half = ours.CosFaceLoss(2, 2)
    assert half(embeddings.half(), labels).dtype == half.W.dtype == torch.float32


def _cosine_similarity(queries: Tensor, references: Tensor) -> Tensor:
    return F.normalize(queries) @ F.normalize(references).t()


def _formula(name: str, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Per-sample losses with the values that each loss has unless told otherwise, a logit at a time."""
    losses = []
    for row, label in zip(x.double(), labels.tolist(), strict=True):
        logits = []
        for c, column in enumerate(w.double()):
            near = column.view(-1, len(row)) @ row / column.view(-1, len(row)).norm(dim=1)
            cosine = float(near.max() / row.norm())
            angle = math.acos(cosine)
            if name.endswith("ArcFaceLoss"):
                margin = math.radians(28.6)
                turned = math.cos(angle + margin) if angle + margin <= math.pi else cosine - margin * math.sin(margin)
                logits.append(64 * (turned if c == label else cosine))
            elif name == "CosFaceLoss":
                logits.append(64 * (cosine - 0.35 * (c == label)))
            elif name == "NormalizedSoftmaxLoss":
                logits.append(cosine / 0.05)
            else:
                k = int(angle / (math.pi / 4))
                turned = (-1) ** k * math.cos(4 * angle) - 2 * k
                length = float(row.norm()) * (float(column.norm()) if name == "LargeMarginSoftmaxLoss" else 1.0)
                logits.append(length * (turned if c == label else cosine))
        highest = max(logits)
        losses.append(highest + math.log(sum(math.exp(logit - highest) for logit in logits)) - logits[label])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_formula_at_every_dtype(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    """And without their package: a missing one cannot be imported."""
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    loss_fn = getattr(ours, name)(9, 6, distance=_cosine_similarity).to(dtype)
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(8, 6, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(9, (8,), generator=generator)
    expected = _formula(name, embeddings.detach(), loss_fn.weight.detach(), labels)
    loss = loss_fn(embeddings, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(loss, expected.mean()) <= (1e-14 if dtype == torch.float64 else 1e-6)
    loss.backward()
    for leaf in (embeddings, loss_fn.W):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert bool(leaf.grad.isfinite().all())
        assert bool(leaf.grad.any())


def test_the_prototypes_are_in_memory_once() -> None:
    loss_fn = ours.ArcFaceLoss(9, 6)
    assert isinstance(loss_fn.W, torch.nn.Parameter)
    assert list(loss_fn.state_dict()) == ["W"]
    for one in (loss_fn, copy.deepcopy(loss_fn), loss_fn.double()):
        assert one.W.shape == (6, 9)
        assert one.weight.is_contiguous()
        assert one.weight.data_ptr() == one.W.data_ptr()
        one.zero_grad()
        one(torch.randn(4, 6), torch.arange(4)).backward()
        assert one.W.grad.stride() == one.W.stride()  # so that none is copied
    prototypes = loss_fn.weight.detach().float()
    assert torch.equal(functional.top_k(prototypes, prototypes).index[:, 0], torch.arange(9))


def test_the_mean_ignores_nothing() -> None:
    """Neither a sample without loss, nor one that no tuple of the miner has."""
    loss_fn = ours.NormalizedSoftmaxLoss(2, 2, temperature=0.01, weight_init_func=torch.nn.init.eye_)
    embeddings, labels = torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 0.0]]), torch.tensor([0, 0, 1])  # 0, 100, 100
    assert _value(loss_fn(embeddings, labels)) == pytest.approx(200 / 3)
    mined = tuple(torch.tensor(indices) for indices in ([1, 1], [2, 0], [0, 0]))  # counts 3, 2, 1
    assert _value(loss_fn(embeddings, labels, mined)) == pytest.approx((100 * 2 / 3 + 100 / 3) / 3)
    assert _value(loss_fn(embeddings, labels, tuple(index[:1] for index in mined))) == pytest.approx(200 / 3)
    assert _value(loss_fn(embeddings, labels, (torch.tensor([1]),))) == pytest.approx(100 / 3)
    assert _value(loss_fn(embeddings, torch.tensor([0, 0, -100]))) == pytest.approx(100 / 3)
    assert _value(loss_fn(embeddings[:0], labels[:0])) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_edges(name: str) -> None:
    """No samples, one of NaN that does not count, one of zeros, a prototype of zeros: gradients are finite."""
    loss_fn = getattr(ours, name)(3, 4)
    empty = torch.empty(0, 4, requires_grad=True)
    loss = loss_fn(empty, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert _value(loss) == 0.0
    assert not bool(loss_fn.W.grad.any())
    with torch.no_grad():
        loss_fn.W[:, 2] = 0.0
    embeddings = torch.randn(4, 4)
    embeddings[1], embeddings[2] = math.nan, 0.0
    embeddings.requires_grad_()
    labels = torch.tensor([0, -100, 1, 2])
    loss = loss_fn(embeddings, labels)
    alone = [_value(loss_fn(embeddings[i : i + 1], labels[i : i + 1])) for i in range(4)]
    assert alone[1] == 0.0
    assert _value(loss) == pytest.approx(sum(alone) / 4)
    for grad in torch.autograd.grad(loss, (embeddings, loss_fn.W)):
        assert bool(grad.isfinite().all())


def test_regularisers_add_up() -> None:
    embeddings, labels = torch.randn(4, 6), torch.arange(4)
    plain = ours.CosFaceLoss(9, 6)
    expected = plain(embeddings, labels) + 0.5 * _lengths(plain.weight) + 3 * _lengths(embeddings)
    options = {"weight_reg_weight": 0.5, "embedding_reg_weight": 3}
    both = ours.CosFaceLoss(9, 6, weight_regularizer=_lengths, embedding_regularizer=_lengths, **options)
    both.load_state_dict(plain.state_dict())
    torch.testing.assert_close(both(embeddings, labels), expected)
    one = ours.CosFaceLoss(9, 6, weight_regularizer=functional.min_angle_regularizer)
    one.load_state_dict(plain.state_dict())
    spread = functional.min_angle_regularizer(plain.weight)
    torch.testing.assert_close(one(embeddings, labels), plain(embeddings, labels) + spread)


def test_what_a_reducer_is_given() -> None:
    embeddings, labels, calls = torch.randn(4, 6), torch.arange(4), []

    def reducer(parts: dict[str, Any], *rest: Tensor) -> Tensor:
        calls.append((parts, rest))
        return next(iter(parts.values()))["losses"].sum()

    loss_fn = ours.ArcFaceLoss(9, 6, reducer=reducer, embedding_regularizer=_lengths)
    total = loss_fn(embeddings, labels)
    (first, rest), (second, _) = calls
    losses = first["loss"]["losses"]
    assert losses.shape == (4,)
    assert losses.requires_grad
    assert first["loss"]["reduction_type"] == "element"
    assert torch.equal(first["loss"]["indices"], torch.arange(4))
    assert rest[0] is embeddings
    assert torch.equal(rest[1], labels)
    assert second["embedding_reg_loss"]["reduction_type"] == "already_reduced"
    torch.testing.assert_close(total, losses.sum() + _lengths(embeddings))


def test_margins_and_scales_can_be_scheduled() -> None:
    """``margin`` of ArcFace is in radians once it is set, as it is there."""
    loss_fn = ours.ArcFaceLoss(2, 2, margin=60, scale=2, weight_init_func=torch.nn.init.eye_)
    assert loss_fn.margin == pytest.approx(math.pi / 3)
    embeddings, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert _value(loss_fn(embeddings, labels)) == pytest.approx(math.log(1 + math.exp(-1.0)))  # 2 cos 60° and 2 cos 90°
    loss_fn.margin, loss_fn.scale = math.pi / 2, 30
    assert _value(loss_fn(embeddings, labels)) == pytest.approx(math.log(2.0))


def test_refusals() -> None:
    loss_fn = ours.ArcFaceLoss(3, 5)
    embeddings, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    with refused("labels", "(4,)", "None"):
        loss_fn(embeddings)
    for ref in ((embeddings.clone(), labels), (embeddings, labels.clone())):
        with refused("ref_emb", "ref_labels", "None"):
            loss_fn(embeddings, labels, ref_emb=ref[0], ref_labels=ref[1])
    loss_fn(embeddings, labels, ref_emb=embeddings, ref_labels=labels)
    with refused("labels", "3", "[0, 3)", error=IndexError):
        loss_fn(embeddings, labels + 1)
    with refused("margin", "degrees", "181"):
        ours.ArcFaceLoss(3, 5, margin=181)
    with refused("margin", "1", "0"):
        ours.SphereFaceLoss(3, 5, margin=0)
    with refused("sub_centers", "8", "9"):
        ours.SubCenterArcFaceLoss(3, 5, sub_centers=9)
    with refused("temperature", "0"):
        ours.NormalizedSoftmaxLoss(3, 5, temperature=0)
    with refused("scale", "-1"):
        ours.CosFaceLoss(3, 5, scale=-1)
    with refused("collect_stats", "True"):
        ours.CosFaceLoss(3, 5, collect_stats=True)
    with refused("distance", "function"):
        ours.CosFaceLoss(3, 5, distance=lambda queries, references: torch.cdist(queries, references))
