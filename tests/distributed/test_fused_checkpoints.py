"""Heads that move inside the backward: saved on some ranks and loaded on others, more classes, one file for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, Case, batch, build, part, whole
from helpers.refusals import refused
from torch import Tensor

from ltloss.distributed import add_classes, class_mesh, load_checkpoint, parallelize, save_checkpoint
from ltloss.float8 import FLOAT8, decoded
from ltloss.interop import export_safetensors, import_safetensors
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD

pytestmark = pytest.mark.slow

CLASSES = 11
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
# Optimizer, its options, and the dtype of the prototypes.
KINDS: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    "sgd": (PrototypeSGD, SGD, torch.float32),
    "adamw": (PrototypeAdamW, {"lr": 0.01, "state_dtype": torch.bfloat16}, torch.float32),
    "adagrad": (PrototypeAdagrad, {"lr": 0.1, "rounding": "stochastic", "seed": 4}, torch.bfloat16),
    "float8": (PrototypeSGD, {**SGD, "rounding": "stochastic", "seed": 2}, FLOAT8),
    "kahan": (PrototypeSGD, {**SGD, "rounding": "kahan", "state_dtype": torch.bfloat16}, torch.bfloat16),
}
State = dict[str, Tensor]


class Job:
    """A head and its optimizer on the ranks there are, or in one process."""

    def __init__(self, kind: str) -> None:
        optimizer, options, dtype = KINDS[kind]
        self.mesh = class_mesh()
        self.head = parallelize(build(Case("ArcFaceLoss", CLASSES, (), dtype)), self.mesh)
        self.optimizer = optimizer(self.head, **options)
        self.given = {"head": self.head}, {"head": self.optimizer}

    def step(self, numbers: range) -> None:
        """Steps over the same global batches on any number of ranks."""
        rank, ranks = (0, 1) if self.mesh is None else (self.mesh.get_local_rank(), self.mesh.size())
        for number in numbers:
            case = Case("ArcFaceLoss", self.head.num_classes, ((12 // ranks,) * ranks,) * (number + 1))
            features, labels = batch(case, number)
            rows = part(case, number, rank)
            torch.autograd.backward(self.head(features[rows].requires_grad_(), labels[rows]))
            self.optimizer.step()

    def state(self) -> State:
        """Prototypes and state in one piece."""
        held = self.optimizer.state[self.head.weight]
        exponent = self.head.weight_exponent
        held = held if exponent is None else {"exponent": exponent, **held}
        return {"weight": whole(self.head.weight), **{name: whole(tensor) for name, tensor in held.items()}}


def _same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def _save(rank: int, folder: Path) -> dict[str, tuple[State, State]]:
    """State at the checkpoint, and two steps later."""
    found = {}
    for kind in KINDS:
        job = Job(kind)
        job.step(range(3))
        save_checkpoint(folder / kind, *job.given, {"step": 3})
        saved = job.state()
        job.step(range(3, 5))
        found[kind] = saved, job.state()
    return found


def _load(rank: int, folder: Path) -> dict[str, tuple[State, State]]:
    found = {}
    for kind in KINDS:
        job = Job(kind)
        assert load_checkpoint(folder / kind, *job.given) == {"step": 3}
        loaded = job.state()
        job.step(range(3, 5))
        found[kind] = loaded, job.state()
    return found


def test_saved_on_two_ranks_and_loaded_on_others(tmp_path: Path) -> None:
    expected = world.run(_save, 2, tmp_path)[0]
    with world.one_thread():
        loads = [_load(0, tmp_path)]
    for ranks in (2, 3, 4):
        loads += world.run(_load, ranks, tmp_path)
    for found in loads:
        for kind in KINDS:
            assert _same(found[kind][0], expected[kind][0]), kind
    for found in loads[1:3]:  # as many ranks: to the same bits
        for kind in KINDS:
            assert _same(found[kind][1], expected[kind][1]), kind


def test_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    job = Job("adamw")
    job.step(range(2))
    save_checkpoint(tmp_path / "adamw", *job.given)
    other = Job("sgd")
    other.step(range(1))
    before = other.state()
    with refused("exp_avg", "momentum_buffer"):
        load_checkpoint(tmp_path / "adamw", *other.given)
    assert _same(other.state(), before)
    plain = torch.optim.SGD([other.head.weight], lr=0.1, momentum=0.9)  # counts no steps
    plain.state[other.head.weight]["momentum_buffer"] = torch.ones(CLASSES, DIM)
    save_checkpoint(tmp_path / "plain", {"head": other.head}, {"head": plain})
    with refused("momentum_buffer", "step"):
        load_checkpoint(tmp_path / "plain", *other.given)
    assert _same(other.state(), before)


def test_an_optimizer_keeps_its_dtype(tmp_path: Path) -> None:
    job = Job("adamw")
    job.step(range(2))
    save_checkpoint(tmp_path / "narrow", *job.given)
    wide = build(Case("ArcFaceLoss", CLASSES, ()))
    optimizer = PrototypeAdamW(wide)
    load_checkpoint(tmp_path / "narrow", {"head": wide}, {"head": optimizer})
    for name, tensor in job.state().items():
        if name != "weight":
            found = optimizer.state[wide.weight][name]
            assert found.dtype == torch.float32
            assert torch.equal(found, tensor.float()), name


def _grown(rank: int | None) -> dict[str, State]:
    found = {}
    for kind in KINDS:
        job = Job(kind)
        job.step(range(2))
        before = job.state()
        torch.manual_seed(3)
        job.head = add_classes(job.head, 3)
        job.optimizer.take_over(job.head)
        found[kind] = job.state()
        for name, tensor in before.items():
            old = found[kind][name][:CLASSES] if tensor.dim() else found[kind][name]
            assert torch.equal(old, tensor), (kind, name)
            assert old.dtype == tensor.dtype
        job.step(range(2, 4))
        assert all(bool(tensor.float().isfinite().all()) for tensor in job.state().values())
        assert not torch.equal(job.state()["weight"], found[kind]["weight"])
    return found


def test_more_classes_on_three_ranks() -> None:
    found = world.run(_grown, 3)
    for kind in KINDS:
        for rank in found[1:]:
            assert _same(rank[kind], found[0][kind]), kind


NARROW = ("adagrad", "float8")


def _exchanged(rank: int, folder: Path) -> dict[str, State]:
    """Written by these ranks; read into a head of the same dtype, and into one of float32."""
    found = {}
    for kind in NARROW:
        job, fresh, wide = Job(kind), Job(kind), Job("sgd")
        job.step(range(2))
        export_safetensors(job.head, folder / kind)
        for head in (fresh.head, wide.head):
            import_safetensors(head, folder / kind)
        assert torch.equal(whole(fresh.head.weight), whole(job.head.weight))
        fresh.step(range(2, 3))
        assert not torch.equal(whole(fresh.head.weight), whole(job.head.weight))
        found[kind] = {**job.state(), "wide": whole(wide.head.weight)}
    return found


def test_narrow_prototypes_as_one_file(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    found = world.run(_exchanged, 2, tmp_path)[0]
    for kind in NARROW:
        theirs, expected = library.load_file(tmp_path / kind), found[kind]
        assert torch.equal(theirs["weight"], expected["weight"])
        with world.one_thread():
            one, wide = Job(kind).head, Job("sgd").head
        for head in (one, wide):
            import_safetensors(head, tmp_path / kind)
        assert torch.equal(one.weight, expected["weight"])
        factor = torch.exp2(theirs["weight_exponent"].float())[:, None] if kind == "float8" else 1.0
        for rows in (wide.weight, expected["wide"]):
            assert torch.equal(rows, expected["weight"].float() * factor)


def test_wide_prototypes_into_a_float8_head_of_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with world.one_thread():
        wide, one = Job("sgd").head, Job("float8").head
    export_safetensors(wide, tmp_path / "wide")
    import_safetensors(one, tmp_path / "wide")
    unit = wide.weight.abs().amax(1, keepdim=True) / 16  # of the largest entry, at most
    assert bool(((decoded(one.weight, one.weight_exponent) - wide.weight).abs() <= unit).all())
    for found in world.run(_imported, 2, tmp_path / "wide"):
        assert torch.equal(found["weight"], one.weight)
        assert torch.equal(found["exponent"], one.weight_exponent)


def _imported(rank: int, path: Path) -> State:
    job = Job("float8")
    import_safetensors(job.head, path)
    return job.state()


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with world.one_thread():
        narrow, wide = Job("float8"), Job("sgd")
    for kind, job, other in (("float8", narrow, wide), ("sgd", wide, narrow)):
        save_checkpoint(tmp_path / kind, {"head": job.head})
        before = other.state()
        with refused("head.weight is", "torch.float8_e4m3fn", "torch.float32"):
            load_checkpoint(tmp_path / kind, {"head": other.head})
        assert _same(other.state(), before)
