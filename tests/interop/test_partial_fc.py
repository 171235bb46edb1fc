"""InsightFace's PartialFC over ours: beside its formulas written out, on one rank and on three, and its files."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import world
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss.interop import import_insightface
from ltloss.interop.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2
from ltloss.testing import relative_error

CONFIGURATIONS = 200
CLASSES, DIM, RANKS = 7, 5, 3  # blocks of 3, 2 and 2 classes; a DTensor has 3, 3 and 1


class Step(NamedTuple):
    """A loss, and its gradients as InsightFace leaves them on one rank."""

    loss: Tensor
    embeddings: Tensor
    weight: Tensor


def _dense(
    embeddings: Tensor, weight: Tensor, labels: Tensor, s: float, m2: float, m3: float, threshold: float = 0.0
) -> Step:
    """As they are: probabilities of at least 1e-30, and the gradient written by hand, in which no margin is."""
    x_norm, w_norm = embeddings.norm(dim=1, keepdim=True), weight.norm(dim=1, keepdim=True)
    x, w = embeddings / x_norm, weight / w_norm
    cosine = (x @ w.t()).clamp(-1, 1)
    one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1.0)
    target = torch.cos(torch.arccos(cosine) + m2) if m2 else cosine - m3
    filtered = (one_hot == 0) & (cosine > threshold) & (threshold > 0)
    exponentials = torch.exp(s * (torch.where(one_hot == 1, target, cosine.masked_fill(filtered, 0.0)) - 1))
    probability = exponentials / exponentials.sum(1, keepdim=True)
    loss = -(probability * one_hot).sum(1).clamp_min(1e-30).log().mean()
    slope = (s * (probability - one_hot) / len(labels)).masked_fill(filtered, 0.0)
    dx, dw = slope @ w, slope.t() @ x
    dx, dw = (d - (d * unit).sum(1, keepdim=True) * unit for d, unit in ((dx, x), (dw, w)))
    return Step(loss, dx / x_norm, dw / w_norm)


def _step(head: PartialFC_V2, embeddings: Tensor, labels: Tensor) -> Step:
    leaf = embeddings.clone().requires_grad_()
    head.zero_grad()
    loss = head(leaf, labels)
    loss.backward()
    assert leaf.grad is not None
    assert head.weight.grad is not None
    return Step(loss.detach(), leaf.grad, head.weight.grad)


def _agree(found: Step, expected: Step, tolerance: float = 2e-12) -> None:
    for name, one, other in zip(Step._fields, found, expected, strict=True):
        error = relative_error(one, other, smallest_size=1.0)
        assert error <= tolerance, f"{name}: {error:.1e}"


def _double(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_and_gradients_are_theirs() -> None:
    """Scales whose losses stay below −log 1e-30 = 69. Margins reach beyond π."""
    for seed in range(CONFIGURATIONS):
        r = random.Random(seed)
        n, c, d, s = r.randint(1, 8), r.randint(1, 12), r.randint(2, 8), r.choice([30.0, 8, 1.5])
        m2, m3 = r.choice([(0.5, 0.0), (r.uniform(0.1, 3.0), 0.0), (0.0, 0.4), (0.0, r.uniform(0.01, 0.9)), (0.0, 0.0)])
        plain = CosFace(s, m3) if m3 else ArcFace(s, m2)
        threshold = r.choice([0, 0, 0.4, 0.1])
        combined = CombinedMarginLoss(s, 1.0, m2, m3, threshold)
        head = PartialFC_V2(combined if threshold else r.choice([plain, combined]), d, c).double()
        head.load_state_dict({"weight": _double(c, d, seed=seed)})
        embeddings, labels = 3 * _double(n, d, seed=seed + 1000), torch.tensor([r.randrange(c) for _ in range(n)])
        given = labels[:, None] if r.random() < 0.5 else labels
        expected = _dense(embeddings, head.weight.detach(), labels, s, m2, m3, threshold)
        _agree(_step(head, embeddings, given), expected)


def test_a_loss_above_69_is_not_cut_off() -> None:
    """The gradient is theirs there too."""
    head = PartialFC_V2(CosFace(64, 0.4), 2, 2).double()
    head.load_state_dict({"weight": torch.eye(2)})
    embeddings, labels = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([0])
    found, cut = _step(head, embeddings, labels), _dense(embeddings, head.weight.detach(), labels, 64, 0.0, 0.4)
    assert float(found.loss) == pytest.approx(64 * 1.4)
    assert float(cut.loss) == pytest.approx(-math.log(1e-30))
    _agree(found._replace(loss=cut.loss), cut)


def test_a_sample_of_the_classes() -> None:
    """The loss over the batch's classes and the others drawn, which alone get gradients; all classes in eval()."""
    head = PartialFC_V2(ArcFace(16, 0.5), DIM, 40, sample_rate=0.25).double()
    embeddings, labels = _double(6, DIM, seed=1), torch.tensor([3, 3, 8, 20, 39, 0])
    found = _step(head, embeddings, labels)
    drawn = found.weight.any(1).nonzero()[:, 0]
    assert len(drawn) == 10
    assert set(labels.tolist()) <= set(drawn.tolist())
    expected = _dense(embeddings, head.weight.detach()[drawn], torch.searchsorted(drawn, labels), 16, 0.5, 0.0)
    _agree(found._replace(weight=found.weight[drawn]), expected)
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    assert set(_step(head, embeddings, labels).weight.any(1).nonzero()[:, 0].tolist()) != set(drawn.tolist())
    _agree(_step(head.eval(), embeddings, labels), _dense(embeddings, head.weight.detach(), labels, 16, 0.5, 0.0))


def test_float16() -> None:
    """Embeddings are rounded to 11 bits: their cosines and hence logits by s·2⁻¹² each, or less."""
    one, other = (PartialFC_V2(ArcFace(16, 0.5), 64, 30, fp16=fp16) for fp16 in (False, True))
    other.load_state_dict(one.state_dict())
    embeddings, labels = _double(8, 64, seed=1).float(), torch.arange(8)
    exact, rounded = (_step(head, embeddings, labels) for head in (one, other))
    assert rounded.embeddings.dtype == torch.float32
    assert 0 < abs(float(exact.loss - rounded.loss)) <= 2 * 16 * 2.0**-12


def test_refusals() -> None:
    for m1, m2, m3 in ((1.2, 0.5, 0.0), (1.0, 0.5, 0.2), (1.0, 0.0, -0.1), (0.9, 0.0, 0.4)):
        with refused(f"m1={m1}", f"m2={m2}", f"m3={m3}", "ltloss.CombinedMarginLoss"):
            CombinedMarginLoss(64, m1, m2, m3)
    with refused("interclass_filtering_threshold", "str", error=TypeError):
        CombinedMarginLoss(64, 1.0, 0.5, 0.0, "0.4")  # type: ignore[arg-type]
    with refused("margin", "4"):
        ArcFace(64, 4)
    with refused("s", "0"):
        CosFace(0)
    with refused("margin_loss", "Linear", error=TypeError):
        PartialFC_V2(torch.nn.Linear(2, 2), DIM, CLASSES)  # type: ignore[arg-type]
    for rate in (0.0, 1.5):
        with refused("sample_rate", str(rate)):
            PartialFC_V2(ArcFace(), DIM, CLASSES, sample_rate=rate)
    head = PartialFC_V2(ArcFace(), DIM, CLASSES)
    with refused("labels", "-1", "[0, 7)", error=IndexError):
        head(torch.randn(2, DIM), torch.tensor([0, -1]))


def _batch(step: int) -> tuple[Tensor, Tensor]:
    return _double(2 * RANKS, DIM, seed=step), torch.arange(2 * RANKS) * (step + 1) % CLASSES


def _train(head: PartialFC_V2, optimizer: torch.optim.Optimizer, steps: range, rows: slice) -> None:
    for step in steps:
        embeddings, labels = _batch(step)
        _step(head, embeddings[rows], labels[rows])
        optimizer.step()


def _new() -> tuple[PartialFC_V2, torch.optim.Optimizer]:
    head = PartialFC_V2(CombinedMarginLoss(16, 1.0, 0.5, 0.0), DIM, CLASSES).double()
    return head, torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def _on_a_rank(rank: int, folder: Path, weight: Tensor) -> tuple[Step, Tensor, Tensor]:
    """A step from given centres; then training, which saves as ``train_v2.py`` does and resumes."""
    rows, (head, optimizer) = slice(2 * rank, 2 * rank + 2), _new()
    assert (head.class_start, head.num_local) == ((0, 3), (3, 2), (5, 2))[rank]
    drawn = head.weight.detach().clone()
    own = slice(head.class_start, head.class_start + head.num_local)
    head.load_state_dict({"weight": weight[own]})
    embeddings, labels = _batch(0)
    first = _step(head, embeddings[rows], labels[rows])
    _train(head, optimizer, range(2), rows)
    checkpoint = {"state_dict_softmax_fc": head.state_dict(), "state_optimizer": optimizer.state_dict()}
    torch.save(checkpoint, folder / f"checkpoint_gpu_{rank}.pt")
    _train(head, optimizer, range(2, 4), rows)
    resumed, optimizer = _new()
    checkpoint = torch.load(folder / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["state_dict_softmax_fc"])
    optimizer.load_state_dict(checkpoint["state_optimizer"])
    _train(resumed, optimizer, range(2, 4), rows)
    assert torch.equal(resumed.weight, head.weight)
    import_insightface(resumed, folder)
    assert torch.equal(resumed.weight, checkpoint["state_dict_softmax_fc"]["weight"])
    assert pickle.loads(pickle.dumps(head.layout)).span() == head.layout.span()
    few = PartialFC_V2(ArcFace(16), DIM, RANKS - 1)  # the last rank has no class
    assert few.num_local == (1, 1, 0)[rank]
    sampled = PartialFC_V2(ArcFace(16), DIM, CLASSES, sample_rate=0.5)
    others = [_step(one, embeddings[rows], labels[rows] % one.num_classes).loss for one in (few, sampled)]
    return first, drawn, torch.stack(others)


def _one_rank(weight: Tensor) -> Tensor:
    """The centres after the steps that the ranks saved."""
    head, optimizer = _new()
    head.load_state_dict({"weight": weight})
    _train(head, optimizer, range(2), slice(None))
    return head.weight.detach()


@pytest.mark.slow
def test_three_ranks_are_one(tmp_path: Path) -> None:
    """DDP divides by the ranks what each rank's embeddings get; files of three are read by one."""
    weight = _double(CLASSES, DIM, seed=9)
    expected = _dense(_batch(0)[0], weight, _batch(0)[1], 16, 0.5, 0.0)
    found = world.run(_on_a_rank, RANKS, tmp_path, weight)
    steps = [step for step, *_ in found]
    for step, _, others in found:
        assert torch.equal(step.loss, steps[0].loss)
        assert torch.equal(others, found[0][2])
        assert bool(others.isfinite().all())
    embeddings, centres = (torch.cat([getattr(step, name) for step in steps]) for name in ("embeddings", "weight"))
    _agree(Step(steps[0].loss, embeddings / RANKS, centres), expected)
    assert not torch.equal(found[0][1][:2], found[1][1])  # each rank drew its own
    trained = _one_rank(weight)
    for head in (ltloss.ArcFaceLoss(CLASSES, DIM).double(), _new()[0]):
        import_insightface(head, tmp_path)
        assert relative_error(head.weight, trained) <= 1e-12
    with refused("(7, 5)", "(8, 5)"):
        import_insightface(PartialFC_V2(ArcFace(), DIM, 8), tmp_path)


def test_one_process_saves_and_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head, optimizer = _new()
    _train(head, optimizer, range(2), slice(None))
    torch.save({"state_dict_softmax_fc": head.state_dict()}, tmp_path / "checkpoint_gpu_0.pt")
    other, _ = _new()
    other.load_state_dict(torch.load(tmp_path / "checkpoint_gpu_0.pt", weights_only=True)["state_dict_softmax_fc"])
    assert torch.equal(other.weight, head.weight)
    assert list(head.state_dict()) == ["weight"]
