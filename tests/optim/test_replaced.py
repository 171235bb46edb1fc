"""Prototypes that are written over: what Kahan's rounding cut off the former ones is not added to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prototype_steps import train_steps

import ltloss
from ltloss.distributed import load_checkpoint, parallelize, save_checkpoint
from ltloss.interop import export_safetensors, import_pytorch_metric_learning, import_safetensors
from ltloss.optim import PrototypeSGD


def _filled(how: str, module: Any, other: Any, folder: Path) -> None:
    if how == "load_state_dict":
        module.load_state_dict(other.state_dict())
    elif how == "safetensors":
        pytest.importorskip("safetensors")
        export_safetensors(other, folder / "head")
        import_safetensors(module, folder / "head")
    elif how == "load_checkpoint":
        save_checkpoint(folder / "head", {"head": other})
        load_checkpoint(folder / "head", {"head": module})
    else:
        import_pytorch_metric_learning(module, {"W": other.weight.detach().t()})


WAYS = ["load_state_dict", "load_checkpoint", "safetensors", "pytorch_metric_learning", "reset_parameters"]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_new_prototypes_do_not_get_what_the_former_ones_lost(how: str, parallel: bool, tmp_path: Path) -> None:
    module, other = (ltloss.ArcFaceLoss(9, 20, dtype=torch.bfloat16) for _ in range(2))
    module = parallelize(module, None, sample_rate=0.5) if parallel else module
    optimizer = PrototypeSGD(module, lr=0.1, rounding="kahan")
    train_steps(module, optimizer, range(2))
    compensation = optimizer.state[module.weight]["compensation"]
    assert bool(compensation.any())
    if how == "reset_parameters":
        module.reset_parameters()
    else:
        _filled(how, module, other, tmp_path)
        assert torch.equal(module.weight, other.weight)
    assert not bool(compensation.any())


@pytest.mark.parametrize("first", ["module", "optimizer"])
def test_a_resumed_run_keeps_what_its_prototypes_lost(first: str) -> None:
    """Whatever is loaded first; a fresh head that trained on its own meanwhile loses its own."""
    module = ltloss.ArcFaceLoss(9, 20, dtype=torch.bfloat16)
    optimizer = PrototypeSGD(module, lr=0.1, rounding="kahan")
    train_steps(module, optimizer, range(2))
    saved = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    again = ltloss.ArcFaceLoss(9, 20, dtype=torch.bfloat16)
    resumed = PrototypeSGD(again, lr=0.1, rounding="kahan")
    train_steps(again, resumed, range(5, 6))
    for name in (first, *(saved.keys() - {first})):
        {"module": again, "optimizer": resumed}[name].load_state_dict(saved[name])
    kept = resumed.state[again.weight]["compensation"]
    assert torch.equal(kept, optimizer.state[module.weight]["compensation"])
    train_steps(again, resumed, range(2, 3))
    again.load_state_dict(saved["module"])
    assert not bool(kept.any())
