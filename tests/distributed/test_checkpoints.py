"""Saved on some ranks, loaded on others; more classes; killed and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import world
from helpers.cases import BUILD, DIM, Case, whole
from helpers.refusals import refused, warned
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ltloss
from ltloss.distributed import (
    DistributedError,
    SampledAdamW,
    add_classes,
    class_mesh,
    load_checkpoint,
    parallelize,
    save_checkpoint,
)
from ltloss.testing import long_tail_counts, problem

pytestmark = pytest.mark.slow

CLASSES = 11


class Job:
    """A backbone, a head and their optimizers, on ranks or in one process, and a batch for every step."""

    def __init__(self, loss: str = "CosineSpaceLoss", sampled: bool = False) -> None:
        torch.manual_seed(1)
        self.backbone = torch.nn.Linear(4, DIM)
        head = BUILD[loss](CLASSES, DIM)
        head.load_state_dict({"weight": problem(1, CLASSES, DIM, dtype=torch.float32)[1]}, strict=False)
        self.head = parallelize(head, class_mesh(), sample_rate=0.5 if sampled else 1.0)
        self.optimizers = {"backbone": torch.optim.SGD(self.backbone.parameters(), lr=0.1)}
        if sampled:
            self.optimizers["head"] = SampledAdamW(self.head)
        else:
            self.optimizers["head"] = torch.optim.AdamW([self.head.weight], lr=0.05)
        self.modules = {"backbone": self.backbone, "head": self.head}

    def step(self, number: int) -> float:
        """One step over the same global batch on any number of ranks."""
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(12, 4, generator=generator)
        labels = torch.randint(CLASSES, (12,), generator=generator)
        mesh = class_mesh()
        rank, ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        loss = self.head(self.backbone(images[rank::ranks]), labels[rank::ranks])
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        if ranks > 1:
            for parameter in self.backbone.parameters():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return float(loss.detach())


def _save(rank: int, folder: Path) -> list[float]:
    """Three steps, a checkpoint, and three more."""
    curves = []
    for loss, sampled in (("CosineSpaceLoss", False), ("ArcFaceLoss", True)):
        job = Job(loss, sampled)
        curves += [job.step(number) for number in range(3)]
        save_checkpoint(folder / loss, job.modules, job.optimizers, {"step": 3})
        curves += [job.step(number) for number in range(3, 6)]
    return curves


def _resume(rank: int, folder: Path, steps: int = 3) -> list[float]:
    job = Job()
    state = load_checkpoint(folder / "CosineSpaceLoss", job.modules, job.optimizers)
    return [job.step(number) for number in range(state["step"], state["step"] + steps)]


def _resume_sampled(rank: int, folder: Path) -> list[float]:
    job = Job("ArcFaceLoss", sampled=True)
    load_checkpoint(folder / "ArcFaceLoss", job.modules, job.optimizers)
    return [job.step(number) for number in range(3, 6)]


def test_saved_on_four_ranks_and_loaded_on_others(tmp_path: Path) -> None:
    curves = world.run(_save, 4, tmp_path)
    expected = torch.tensor(curves[0])
    for ranks, steps in ((2, 3), (3, 3), (8, 1)):
        for found in world.run(_resume, ranks, tmp_path, steps):
            assert torch.allclose(torch.tensor(found), expected[3 : 3 + steps], rtol=1e-4)
    with world.one_thread():
        assert torch.allclose(torch.tensor(_resume(0, tmp_path)), expected[3:6], rtol=1e-4)
    # A sample is drawn per shard, so only the same number of ranks draws the same classes again.
    for found in world.run(_resume_sampled, 4, tmp_path):
        assert found == curves[0][9:12]
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    job = Job()
    job.step(0)
    save_checkpoint(tmp_path / "one", job.modules, job.optimizers, {"step": 1})
    with refused(str(tmp_path / "one"), error=FileExistsError):
        save_checkpoint(tmp_path / "one", job.modules)
    larger = ltloss.CosineSpaceLoss(CLASSES + 1, DIM)
    before = larger.weight.detach().clone()
    with refused("head.weight", "(11, 6)", "(12, 6)"):
        load_checkpoint(tmp_path / "one", {"head": larger})
    assert torch.equal(larger.weight, before)
    with refused(str(tmp_path / "two"), error=FileNotFoundError):
        load_checkpoint(tmp_path / "two", {"head": larger})
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "three", {"head": job.head}, job.optimizers)
    assert not (tmp_path / "three").exists()


class Wrapper(torch.nn.Module):
    """What is in it has the names of what it has itself."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.weight = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.randn(5))


def _averaged(rank: int | None, folder: Path) -> None:
    def build() -> tuple[ltloss.PrototypeHead, AveragedModel]:
        head = parallelize(ltloss.ArcFaceLoss(CLASSES, DIM), class_mesh())
        return head, AveragedModel(head, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    head, average = build()
    for _ in range(3):
        head.weight.data.mul_(1.5)
        average.update_parameters(head)
    save_checkpoint(folder / "averaged", {"head": head, "average": average})
    resumed, loaded = build()
    load_checkpoint(folder / "averaged", {"head": resumed, "average": loaded})
    assert int(loaded.n_averaged) == 3
    for module, mean in ((head, average), (resumed, loaded)):
        module.weight.data.mul_(1.5)
        mean.update_parameters(module)
    assert torch.equal(whole(loaded.module.weight), whole(average.module.weight))


def test_what_wraps_a_module_is_stored_too(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    _averaged(None, tmp_path)
    world.run(_averaged, 2, tmp_path / "ranks")
    one, other = Wrapper(), Wrapper()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (one, other)]
    (one.module.weight.sum() + one.weight.sum()).backward()
    optimizers[0].step()
    save_checkpoint(tmp_path / "wrapper", {"net": one}, {"sgd": optimizers[0]})
    load_checkpoint(tmp_path / "wrapper", {"net": other}, {"sgd": optimizers[1]})
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert torch.equal(optimizers[1].state[other.weight]["momentum_buffer"], torch.ones(5))


def _running(rank: int, folder: Path) -> list[str]:
    norms = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net = torch.nn.parallel.DistributedDataParallel(norms)
    net(torch.randn(16, 4, generator=torch.Generator().manual_seed(rank)) * (1 + rank))
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    save_checkpoint(folder / "running", {"net": net})
    load_checkpoint(folder / "running", {"net": net})
    after = net.module.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]


def test_running_means_of_ranks_are_not_mixed(tmp_path: Path) -> None:
    first, second = world.run(_running, 2, tmp_path)
    assert first == []  # under DDP those of rank 0 count
    assert second == ["0.running_mean", "0.running_var", "2.running_mean", "2.running_var"]


def _other_placement(rank: int, folder: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        net = torch.nn.Linear(6, 8)
        fully_shard(net, mesh=class_mesh(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    net, optimizer = build()
    net(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    save_checkpoint(folder / "columns", {"net": net}, {"adamw": optimizer})
    other, resumed = build()
    load_checkpoint(folder / "columns", {"net": other}, {"adamw": resumed})
    for parameter, former in zip(other.parameters(), net.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = resumed.state[parameter][name]
            assert moment.placements == parameter.placements
            assert torch.equal(moment.to_local(), optimizer.state[former][name].to_local())


def test_state_is_placed_as_its_parameter(tmp_path: Path) -> None:
    world.run(_other_placement, 2, tmp_path)


def test_a_checkpoint_without_what_wraps_a_module_loads(tmp_path: Path) -> None:
    average = AveragedModel(ltloss.ArcFaceLoss(CLASSES, DIM))
    save_checkpoint(tmp_path / "former", {"average": average.module})  # as versions that dropped it named the tensors
    other = AveragedModel(ltloss.ArcFaceLoss(CLASSES, DIM))
    with warned("average..n_averaged", kind=UserWarning):
        load_checkpoint(tmp_path / "former", {"average": other})
    assert torch.equal(other.module.weight, average.module.weight)


def _killed(rank: int, folder: Path, moment: int) -> None:
    """Train with a checkpoint every other step, from the newest one, until rank 1 is killed at a step."""
    job = Job()
    found = sorted(path for path in folder.glob("step-*") if path.suffix == "")
    first = load_checkpoint(found[-1], job.modules, job.optimizers)["step"] if found else 0
    for number in range(first, 12):
        if rank == 1 and number == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = job.step(number)
        if rank == 0:
            with (folder / "curve.txt").open("a") as file:
                file.write(f"{number} {loss!r}\n")
        if number % 2 == 1:
            save_checkpoint(folder / f"step-{number + 1:02d}", job.modules, job.optimizers, {"step": number + 1})


def _curve(folder: Path) -> dict[int, str]:
    return dict(line.split() for line in (folder / "curve.txt").read_text().splitlines())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_resumed_continues_the_curve(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    world.run(_killed, 2, tmp_path / "whole", -1)
    for moment in (3, 8):
        first, second = world.finish(world.start(_killed, 2, tmp_path / "killed", moment, timeout=20.0))
        assert isinstance(first, DistributedError)
        assert isinstance(second, world.Lost)
    world.run(_killed, 2, tmp_path / "killed", -1)
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "whole")


def _grown(rank: int | None) -> None:
    for case in (Case(name, 10, ()) for name in ("CosineSpaceLoss", "LDAMLoss", "CurricularFaceLoss with sub-centres")):
        head = BUILD[case.loss](case.classes, DIM)
        if rank is not None:
            head = parallelize(head, class_mesh())
        head(torch.randn(4, DIM), torch.tensor([0, 3, 5, 9]))
        margins = long_tail_counts(13) / 400.0
        vectors = {"cosine_margin": margins} if case.loss == "LDAMLoss" else {}
        larger = add_classes(head, 3, **vectors)
        assert larger.num_classes == 13
        assert head.num_classes == head.weight.shape[0] == 10
        assert torch.equal(whole(larger.weight)[:10], whole(head.weight))
        assert bool((whole(larger.weight)[10:].norm(dim=-1) > 0).all())
        for name, tensor in head.state_dict().items():
            if tensor.dim():
                assert torch.equal(whole(larger.state_dict()[name])[:10], whole(tensor))
        torch.autograd.backward(larger(torch.randn(2, DIM), torch.tensor([12, 0])))
        assert larger.weight.grad is not None
        assert larger.weight.grad.shape == (13, *head.weight.shape[1:])
        assert head.weight.grad is None


def _apart(rank: int | None) -> None:
    for loss in ("CosineSpaceLoss", "AdaFaceLoss", "ElasticFaceLoss", "CurricularFaceLoss with sub-centres"):
        head = BUILD[loss](10, DIM)
        if rank is not None:
            head = parallelize(head, class_mesh())
        head(torch.randn(4, DIM), torch.tensor([0, 3, 5, 9]))
        before = {name: whole(tensor) for name, tensor in head.state_dict().items()}
        larger = add_classes(head, 3)
        for name, tensor in larger.state_dict().items():
            kept = whole(tensor)[:10] if tensor.dim() and len(tensor) == 13 else tensor
            assert torch.equal(kept, before[name]), name
        torch.autograd.backward(larger(torch.randn(2, DIM), torch.tensor([12, 0])))
        for name, tensor in head.state_dict().items():
            assert torch.equal(whole(tensor), before[name]), name


def test_more_classes_leave_the_former_head_alone() -> None:
    _apart(None)
    world.run(_apart, 2)
    head = parallelize(ltloss.CosFaceLoss(10, DIM), None, sample_rate=0.5)
    head.sampler.step = 3
    larger = add_classes(head, 3)
    larger.sampler.step += 1
    assert head.sampler.step == 3


def test_more_classes_with_a_scale_that_is_learned() -> None:
    head = ltloss.CosFaceLoss(10, DIM)
    head.log_scale = torch.nn.Parameter(torch.tensor(1.5))
    larger = add_classes(head, 3)
    larger.log_scale.data += 1.0
    assert (head.log_scale.item(), larger.log_scale.item()) == (1.5, 2.5)


def test_more_classes_keep_the_old_rows() -> None:
    _grown(None)
    world.run(_grown, 3)
    with refused("'cosine_margin'", "12", "[]"):
        add_classes(BUILD["LDAMLoss"](9, DIM), 3)
    with refused("count", "1", "0"):
        add_classes(ltloss.ArcFaceLoss(9, DIM), 0)
