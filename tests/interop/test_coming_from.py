"""``docs/coming-from.md``: what stands side by side in its tables computes the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ltloss
from ltloss.interop import import_insightface, import_pytorch_metric_learning, insightface, pytorch_metric_learning

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
CLASSES, DIM = 9, 6
WORDS = {"C": CLASSES, "D": DIM, "math": math}


def _rows(first: str) -> list[tuple[list[str], str]]:
    """What a row whose first word is that has in its first cell, and the loss of ltloss in its second."""
    found = re.findall(rf"^\| (`(?:{first})\(.*) \| `(\w+Loss\(C, D, .*)` \|$", PAGE, re.MULTILINE)
    return [(re.findall("`(.*?)`", cell), loss) for cell, loss in found]


def _code(text: str, module: Any) -> Any:
    return eval(text, {name: getattr(module, name) for name in module.__all__} | WORDS)


def _step(loss_fn: Any, prototypes: Tensor) -> list[Tensor]:
    features = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = loss_fn(features, torch.arange(CLASSES))
    features_grad, grad = torch.autograd.grad(loss, (features, prototypes))
    return [loss, features_grad, grad if grad.shape == (CLASSES, DIM) else grad.t()]


def test_pytorch_metric_learning() -> None:
    rows = _rows("ArcFaceLoss|CosFaceLoss|NormalizedSoftmaxLoss|SphereFaceLoss")
    assert len(rows) == 4
    for (theirs,), ours in rows:
        one, head = _code(theirs, pytorch_metric_learning), _code(ours, ltloss)
        import_pytorch_metric_learning(head, one)
        torch.testing.assert_close(_step(one, one.W), _step(head, head.weight))


def test_insightface(tmp_path: Path) -> None:
    rows = _rows("ArcFace|CosFace")
    assert [len(theirs) for theirs, _ in rows] == [2, 2]
    for theirs, ours in rows:
        for margin_loss in theirs:
            one, head = insightface.PartialFC_V2(_code(margin_loss, insightface), DIM, CLASSES), _code(ours, ltloss)
            torch.save({"state_dict_softmax_fc": one.state_dict()}, tmp_path / "checkpoint_gpu_0.pt")
            import_insightface(head, tmp_path)
            torch.testing.assert_close(_step(one, one.weight), _step(head, head.weight))
