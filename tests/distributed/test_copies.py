"""Copies of a parallel module: deepcopy, moving averages, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import world
from helpers.cases import Case, batch, build, part, whole
from helpers.refusals import refused
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import ltloss
from ltloss.distributed import DistributedError, class_mesh, parallelize
from ltloss.testing import relative_error

pytestmark = pytest.mark.slow

CASE = Case("CosineSpaceLoss", 11, ((3, 3),) * 3)


def _meshes() -> list[Any]:
    if not dist.is_initialized():
        return [None]
    if dist.get_world_size() == 2:
        return [class_mesh(), class_mesh(2)]
    part_of_the_world = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("data", "class"))
    return [part_of_the_world] if dist.get_rank() < 2 else []


def _step(module: Any, optimizer: torch.optim.Optimizer, step: int, rank: int | None) -> torch.Tensor:
    rows = slice(None) if rank is None else part(CASE, step, rank)
    features, labels = batch(CASE, step)
    optimizer.zero_grad()
    loss: torch.Tensor = module(features[rows], labels[rows])
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def _pickled(module: Any) -> Any:
    content = io.BytesIO()
    torch.save(module, content)
    content.seek(0)
    return torch.load(content, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module)), "save": _pickled}


def _copies(rank: int | None) -> dict[Any, bool]:
    """Whether a copy trains on like the module, which does not notice it."""
    same = {}
    for number, mesh in enumerate(_meshes()):
        for name, copied in COPIES.items():
            rate = 0.5 if number == 0 else 1.0
            module = parallelize(build(CASE), mesh, sample_rate=rate)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            _step(module, optimizer, 0, rank)
            before = whole(module.weight)
            twin = copied(module)
            losses = [_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), step, rank) for step in (1, 2)]
            same[number, name, "apart"] = torch.equal(whole(module.weight), before)
            same[number, name, "alike"] = losses == [_step(module, optimizer, step, rank) for step in (1, 2)]
            for key, tensor in module.state_dict().items():
                same[number, name, key] = torch.equal(whole(tensor), whole(twin.state_dict()[key]))
            same[number, name, "class"] = type(twin) is type(module)
    return same


def test_a_copy_trains_on_like_the_module() -> None:
    for same in (_copies(None), *world.run(_copies, 2), *world.run(_copies, 3)):
        assert all(same.values()), same


def _average(rank: int | None, mesh: Any) -> dict[str, torch.Tensor]:
    module = build(CASE) if rank is None else parallelize(build(CASE), mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for step in range(3):
        _step(module, optimizer, step, rank)
        average.update_parameters(module)
    features, _ = batch(CASE, 0)
    predicted = average.module.predict(features[slice(None) if rank is None else part(CASE, 0, rank)])
    return {"weight": whole(average.module.weight), "cosine": predicted.cosine}


def _averages(rank: int) -> list[dict[str, torch.Tensor]]:
    return [_average(rank, mesh) for mesh in _meshes()]


def test_a_moving_average_is_that_of_one_process() -> None:
    one = _average(None, None)
    for meshes in zip(*world.run(_averages, 2), strict=True), zip(*world.run(_averages, 3)[:2], strict=True):
        for ranks in meshes:
            for found in ranks:
                assert relative_error(found["weight"], one["weight"]) <= 1e-5
            cosine = torch.cat([found["cosine"] for found in ranks])
            assert relative_error(cosine, one["cosine"]) <= 1e-5


def _save(rank: int, path: Path) -> None:
    module = parallelize(build(CASE), class_mesh())
    if rank == 0:
        torch.save(module, path)


def _load(rank: int, path: Path) -> None:
    with refused("2", error=DistributedError):
        torch.load(path, weights_only=False)


def test_a_pickle_is_refused_by_other_ranks(tmp_path: Path) -> None:
    world.run(_save, 2, tmp_path / "module.pt")
    _load(0, tmp_path / "module.pt")
    world.run(_load, 1, tmp_path / "module.pt")


def _mixed(action: Callable[[], object]) -> bool:
    """Whether PyTorch refuses to take ordinary tensors and DTensors in one operation."""
    try:
        action()
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        return True
    return False


def _as_on_a_gpu(rank: int) -> dict[str, bool]:
    """The table in docs/distributed.md: what fails where foreach is the default."""
    backbone = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    head, linear = (parallelize(kind(11, 4), class_mesh()) for kind in (ltloss.ArcFaceLoss, ltloss.LinearSoftmaxLoss))
    model = torch.nn.ModuleDict({"backbone": backbone, "head": head, "linear": linear})
    features, labels = torch.randn(3, 4), torch.tensor([0, 5, 10])
    (head(backbone(features), labels) + linear(backbone(features), labels)).backward()
    ordinary = {"params": [p for p in model.parameters() if not hasattr(p, "device_mesh")]}
    sharded = {"params": [head.weight, linear.weight]}
    everything = list(model.parameters())
    means = {
        "default": {},
        "multi": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        "single": {"avg_fn": get_ema_avg_fn()},
    }
    refused = {}
    with (
        patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        patch("torch.optim.swa_utils._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
    ):
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            refused |= {
                f"{kind.__name__} of one group": _mixed(kind(everything, lr=0.1).step),
                f"{kind.__name__} of LinearSoftmaxLoss": _mixed(kind(linear.parameters(), lr=0.1).step),
                f"{kind.__name__} of the head": _mixed(kind(head.parameters(), lr=0.1).step),
                f"{kind.__name__} of two groups": _mixed(kind([ordinary, sharded], lr=0.1).step),
                f"{kind.__name__} without foreach": _mixed(kind(everything, lr=0.1, foreach=False).step),
            }
        for what, module in (("the head", head), ("LinearSoftmaxLoss", linear), ("the model", model)):
            for name, options in means.items():
                average = AveragedModel(module, **options)
                average.update_parameters(module)
                refused[f"{name} average of {what}"] = _mixed(lambda a=average, m=module: a.update_parameters(m))
    return refused


def test_what_an_optimizer_takes_together_on_a_gpu() -> None:
    for found in world.run(_as_on_a_gpu, 2):
        assert {name for name, refused in found.items() if refused} == {
            *(f"{kind} of {what}" for kind in ("SGD", "AdamW") for what in ("one group", "LinearSoftmaxLoss")),
            *(
                f"{name} average of {what}"
                for name in ("default", "multi")
                for what in ("LinearSoftmaxLoss", "the model")
            ),
        }
