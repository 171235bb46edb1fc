"""Heads with sub-centres over ranks: a sample of the classes, checkpoints, files, predictions, and what is refused.

Loss, gradients and steps beside one process: ``test_exact.py``, which has them among the other modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, whole
from helpers.refusals import refused
from torch import Tensor

import ltloss
from ltloss import functional as F
from ltloss.distributed import (
    SampledAdamW,
    SampledSGD,
    class_mesh,
    in_one_piece,
    load_checkpoint,
    parallelize,
    save_checkpoint,
)
from ltloss.interop import export_safetensors, import_safetensors
from ltloss.sub_centers import outliers
from ltloss.testing import problem, relative_error

CLASSES, K = 11, 3
OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (SampledSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (SampledAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.01}),
}


def _head(mesh: Any = None, **options: Any) -> Any:
    head = ltloss.ArcFaceLoss(CLASSES, DIM, scale=8.0, margin=0.2, sub_centers=K)
    prototypes = problem(1, CLASSES * K, DIM, dtype=torch.float32, seed=3)[1].view(CLASSES, K, DIM)
    prototypes[9, 2] = prototypes[2, 1]  # equally near classes of different ranks
    head.load_state_dict({"weight": prototypes})
    return parallelize(head, mesh, **options)


def _batch(step: int = 0) -> tuple[Tensor, Tensor]:
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32, seed=step)
    return features, labels


def _step(head: Any, optimizer: torch.optim.Optimizer, step: int, rows: slice) -> Tensor:
    features, labels = _batch(step)
    optimizer.zero_grad()
    loss: Tensor = head(features[rows], labels[rows])
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_sampled_classes(name: str) -> None:
    """Over all classes they are those of torch; of a sample they leave the other classes as they are."""
    ours, theirs, options = OPTIMIZERS[name]
    found, expected = _head(), _head()
    pair = (found, ours(found, **options)), (expected, theirs([expected.weight], **options))
    before = found.weight.detach().clone()
    for head, optimizer in pair:
        head.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert relative_error(found.weight.detach() - before, expected.weight.detach() - before) <= 1e-5
    head = _head(sample_rate=0.5)
    optimizer = ours(head, **options)
    _step(head, optimizer, 0, slice(None))
    moved = (head.weight.detach() != before).flatten(1).any(1)
    assert moved.tolist() == head.weight.grad.flatten(1).any(1).tolist()
    assert int(moved.sum()) == 6  # half of eleven, rounded up


def _sampled(rank: int) -> None:
    """The loss of a draw, beside that of the classes that were drawn, in one process."""
    for name, (ours, _, options) in OPTIMIZERS.items():
        head = _head(class_mesh(), sample_rate=0.5, unbiased=False)
        optimizer = ours(head, **options)
        rows = slice(rank * 2, rank * 2 + 2)
        before = whole(head.weight)
        loss = _step(head, optimizer, 0, rows)
        grad = whole(head.weight.grad)
        chosen = grad.flatten(1).any(1).nonzero()[:, 0]
        assert CLASSES // 2 <= len(chosen) < CLASSES, name
        features, labels = _batch()
        labels = torch.where(labels == -100, -100, torch.searchsorted(chosen, labels))
        part = before[chosen].requires_grad_()
        exact = F.margin_cross_entropy(features, part, labels, scale=8.0, angular_margin=0.2)
        torch.autograd.backward(exact)
        assert part.grad is not None
        assert relative_error(loss, exact.detach()) <= 1e-6, name
        assert relative_error(grad[chosen], part.grad, 1e-2) <= 1e-5, name
        assert torch.equal((whole(head.weight) != before).flatten(1).any(1).nonzero()[:, 0], chosen), name


def _saved(rank: int, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint and a file; then two more."""
    head = _head(class_mesh())
    optimizer = SampledAdamW(head, lr=0.05)
    rows = slice(rank * 2, rank * 2 + 2)
    for step in range(3):
        _step(head, optimizer, step, rows)
    save_checkpoint(folder / "checkpoint", {"head": head}, {"head": optimizer}, {"step": 3})
    export_safetensors(head, folder / "head.safetensors")
    found = {"weight": whole(head.weight), "logits": in_one_piece(head).logits(_batch()[0]).detach()}
    best = head.predict(_batch()[0][rows], k=4)
    found |= {"index": best.index, "cosine": best.cosine}
    assert torch.equal(in_one_piece(head).weight, found["weight"])
    return {**found, "curve": torch.stack([_step(head, optimizer, step, rows) for step in range(3, 5)])}


def _loaded(rank: int, folder: Path, ranks: int) -> dict[str, Any]:
    head, other = _head(class_mesh()), _head(class_mesh())
    optimizer = SampledAdamW(head, lr=0.05)
    load_checkpoint(folder / "checkpoint", {"head": head}, {"head": optimizer})
    import_safetensors(other, folder / "head.safetensors")
    assert torch.equal(whole(other.weight), whole(head.weight))
    rows = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    found = {"weight": whole(head.weight)}
    return {**found, "curve": torch.stack([_step(head, optimizer, step, rows) for step in range(3, 5)])}


def _refused(rank: int) -> None:
    weight = _head(class_mesh()).weight
    for search in (F.nearest_prototype, F.min_angle_regularizer):
        with refused("sub-centres", "(11, 3, 6)", "in_one_piece"):
            search(weight)
    with refused("in_one_piece"):
        outliers(_batch()[0], weight, _batch()[1])


def _drawn(rank: int) -> Tensor:
    torch.manual_seed(5)
    with torch.device("meta"):
        head = ltloss.ArcFaceLoss(CLASSES, DIM, sub_centers=K)
    return whole(parallelize(head, class_mesh()).weight)


def _on_three(rank: int, folder: Path) -> tuple[dict[str, Any], Tensor]:
    _sampled(rank)
    _refused(rank)
    return _saved(rank, folder), _drawn(rank)


@pytest.mark.slow
def test_three_ranks_beside_one(tmp_path: Path) -> None:
    found = world.run(_on_three, 3, tmp_path)
    saved, drawn = found[0]
    head = ltloss.ArcFaceLoss(CLASSES, DIM, sub_centers=K, scale=8.0, margin=0.2)
    import_safetensors(head, tmp_path / "head.safetensors")
    assert torch.equal(head.weight, saved["weight"])
    best = head.predict(_batch()[0], k=4)
    assert torch.equal(torch.cat([one["index"] for one, _ in found]), best.index)
    torch.testing.assert_close(torch.cat([one["cosine"] for one, _ in found]), best.cosine)
    torch.testing.assert_close(head.logits(_batch()[0]).detach(), saved["logits"])
    with world.one_thread():
        others = [_loaded(0, tmp_path, 1), *world.run(_loaded, 2, tmp_path, 2)]
    for other in others:
        assert torch.equal(other["weight"], saved["weight"])
        torch.testing.assert_close(other["curve"], saved["curve"], rtol=1e-4, atol=1e-6)
    assert torch.equal(drawn, _drawn(0))
    assert drawn.shape == (CLASSES, K, DIM)


def test_a_file_with_other_sub_centers_is_refused(tmp_path: Path) -> None:
    export_safetensors(_head(), tmp_path / "head.safetensors")
    for k in (1, 2):
        with refused("weight", "(11, 3, 6)"):
            import_safetensors(ltloss.ArcFaceLoss(CLASSES, DIM, sub_centers=k), tmp_path / "head.safetensors")
