"""Class-parallel training equals one process: loss, gradients, optimizer steps, centres and predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import BUILD, DIM, Case, Trace, build, trace, whole
from torch import Tensor

from ltloss import CosineSpaceLoss, PrototypeHead
from ltloss.distributed import class_mesh, parallelize
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.testing import problem, relative_error

pytestmark = pytest.mark.slow

STEPS = 6  # the pattern of the sizes once, and half of it again
# float32 sums over shards are taken in another order; more steps with momentum carry the difference on.
ONE_STEP, ALL_STEPS = 2e-5, 1.2e-4


def sizes(ranks: int) -> tuple[tuple[int, ...], ...]:
    """Ragged batches whose lengths change from step to step; some ranks have nothing at times."""
    pattern = ((5, 3, 0, 2), (4, 4, 4, 4), (0, 6, 1, 3), (7, 2, 9, 0))
    return tuple(
        tuple(pattern[(step + rank) % 4][rank] or (rank == 0) for rank in range(ranks)) for step in range(STEPS)
    )


def _cases(ranks: int) -> list[Case]:
    """All steps of every module and of the member that has everything, two of the rest of the family."""
    many = {name for name in BUILD if not name.startswith("family")} | {"family everything"}
    every = [Case(name, 11, sizes(ranks)[: STEPS if name in many else 2]) for name in BUILD]
    exact = [Case(name, 9, sizes(ranks), torch.float64) for name in ("family everything", "LongTailLoss")]
    few = [Case(name, c, sizes(ranks)[:3]) for name in ("LongTailLoss", "CosineSpaceLoss") for c in (1, 2, 5)]
    return every + exact + few


def _all(rank: int, ranks: int, meshes: tuple[int, ...]) -> list[list[Trace]]:
    return [[trace(case, rank, data) for case in _cases(ranks)] for data in meshes]


@pytest.mark.parametrize(("ranks", "meshes"), [(1, (1,)), (2, (1, 2)), (3, (1,)), (4, (1, 2))])
def test_equals_one_process(ranks: int, meshes: tuple[int, ...]) -> None:
    """On meshes of one dimension, and of as many data groups as ``meshes`` says."""
    found = world.run(_all, ranks, ranks, meshes)
    with world.one_thread():
        expected = [trace(case) for case in _cases(ranks)]
    for place in range(len(meshes)):
        for number, case in enumerate(_cases(ranks)):
            _compare(case, [rank[place][number] for rank in found], expected[number])


EMPTY = [Case(name, 11, ((2, 1), (0, 0), (1, 2))) for name in BUILD]


def _with_an_empty_step(rank: int) -> list[Trace]:
    return [trace(case, rank) for case in EMPTY]


def test_a_step_in_which_no_rank_has_samples() -> None:
    found = world.run(_with_an_empty_step, 2)
    for number, case in enumerate(EMPTY):
        _compare(case, [rank[number] for rank in found], trace(case))


def _compare(case: Case, ranks: list[Trace], one: Trace) -> None:
    scale = 1e-7 if case.dtype == torch.float64 else 1.0
    for step, loss in enumerate(one.losses):
        tolerance = scale * (ONE_STEP if step == 0 else ALL_STEPS)
        shared = [rank.losses[step] for rank in ranks]
        together = torch.cat(shared) if loss.dim() else shared[0]
        assert all(torch.equal(other, shared[0]) for other in shared) or loss.dim(), "ranks have different losses"
        assert relative_error(together, loss, 1e-3) <= tolerance, f"{case.loss}, C={case.classes}: loss of step {step}"
        grads = torch.cat([rank.feature_grads[step] for rank in ranks])
        error = relative_error(grads, one.feature_grads[step], 1e-2)
        assert error <= tolerance, f"{case.loss}, C={case.classes}: features in step {step}: {error:.1e}"
    for rank in ranks:
        error = relative_error(rank.weight_grad, one.weight_grad, 1e-2)
        assert error <= scale * ONE_STEP, f"{case.loss}, C={case.classes}: gradient of the weight: {error:.1e}"
        error = relative_error(rank.weight, one.weight)
        assert error <= scale * ALL_STEPS, f"{case.loss}, C={case.classes}: weight after all steps: {error:.1e}"
        assert rank.state.keys() == one.state.keys()
        for name, tensor in one.state.items():
            assert relative_error(rank.state[name], tensor, 1e-2) <= scale * ALL_STEPS, f"{case.loss}: {name}"
    cosine, index = (torch.cat([rank.predicted[part] for rank in ranks]) for part in (0, 1))
    assert torch.equal(index, one.predicted[1]), case.loss
    assert relative_error(cosine, one.predicted[0]) <= scale * ALL_STEPS


class _LearnedScale(PrototypeHead):
    """A learned scale, for all samples or by their length, and a margin, through which the scale acts once more."""

    def __init__(self, by_length: bool) -> None:
        super().__init__(11, DIM, scale=8.0)
        self.log_scale, self.by_length = torch.nn.Parameter(torch.tensor(2.0)), by_length

    def forward(self, features: Tensor, labels: Tensor, *, shard: Any = None) -> Tensor:
        scale = self.log_scale.exp() * (features.norm(dim=1).clamp(0.5, 2.0) if self.by_length else 1.0)
        stats = logsumexp_stats(features, self.weight, labels, scale=scale, shard=shard)
        return reduce_losses(margin_losses(stats, angular_margin=0.3), stats.labels)


def _scale_gradients(rank: int | None, by_length: bool, data: int = 1, **options: Any) -> list[Tensor]:
    """Of the scale and of the features; of the scale alone, without a gradient of features."""
    head = _LearnedScale(by_length)
    head.load_state_dict({"weight": problem(1, 11, DIM, dtype=torch.float32)[1], "log_scale": torch.tensor(2.0)})
    if rank is not None:
        head = parallelize(head, class_mesh(data), **options)
    features, _, labels = problem(7, 11, DIM, dtype=torch.float32)
    rows = slice(None) if rank is None else slice(rank, None, 2)
    mine = features[rows].clone().requires_grad_()
    torch.autograd.backward(head(mine, labels[rows]))
    assert mine.grad is not None
    assert head.log_scale.grad is not None
    grads = [mine.grad, head.log_scale.grad.clone()]
    head.zero_grad()
    torch.autograd.backward(head(features[rows], labels[rows]))
    return [*grads, head.log_scale.grad]


def _learned_scales(rank: int) -> list[list[Tensor]]:
    options = ({"data": 1}, {"data": 2}, {"data": 1, "sample_rate": 1.0 - 1e-9})
    return [_scale_gradients(rank, kind, **more) for kind in (False, True) for more in options]


def test_a_learned_scale_has_the_gradient_of_one_process_on_every_rank() -> None:
    found = world.run(_learned_scales, 2)
    for number, kind in enumerate((False, False, False, True, True, True)):
        features, *scales = _scale_gradients(None, kind)
        for rank, grads in enumerate(found):
            mine, *others = grads[number]
            assert relative_error(mine, features[rank::2]) <= ONE_STEP
            for scale, expected in zip(others, scales, strict=True):
                assert relative_error(scale, expected) <= ONE_STEP, (number, rank)


def _loaded_on_first_rank(rank: int, data: int) -> dict[str, Tensor]:
    head = CosineSpaceLoss(11, DIM)
    if rank == 0:
        head.load_state_dict(_state())
    return {name: whole(tensor) for name, tensor in parallelize(head, class_mesh(data)).state_dict().items()}


def _state() -> dict[str, Any]:
    head = build(Case("CosineSpaceLoss", 11, ()))
    features, _, labels = problem(20, 11, DIM, dtype=torch.float32)
    head(features, labels)
    return head.state_dict()


@pytest.mark.parametrize("data", [1, 2])
def test_centres_too_are_those_of_the_first_rank(data: int) -> None:
    expected = _state()
    assert bool(expected["centers.counts"].any())
    for state in world.run(_loaded_on_first_rank, 2, data):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items()), state


def _reset(rank: int) -> list[bool]:
    """Whether nothing is left of a step but in constants, and the prototypes are others."""
    fresh = []
    for name in ("CosineSpaceLoss", "AdaFaceLoss", "CurricularFaceLoss", "ElasticFaceLoss"):
        head = parallelize(build(Case(name, 11, ())), class_mesh())
        first = {key: whole(tensor) for key, tensor in head.state_dict().items()}
        features, _, labels = problem(8, 11, DIM, dtype=torch.float32)
        head(features, labels)
        stepped = {key: whole(tensor) for key, tensor in head.state_dict().items() if key != "weight"}
        fresh.append(any(not torch.equal(tensor, first[key]) for key, tensor in stepped.items()))
        head.reset_parameters()
        for key, tensor in head.state_dict().items():
            fresh.append(torch.equal(whole(tensor), first[key]) == (key != "weight"))
    return fresh


def test_parameters_are_reset_as_in_one_process() -> None:
    assert all(all(fresh) for fresh in world.run(_reset, 2))
