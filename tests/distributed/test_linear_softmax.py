"""A linear softmax whose classes are spread or sampled: what is its own there is the bias, whole on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM, Case, batch, build, part, whole
from torch import Tensor

from ltloss import LinearSoftmaxLoss
from ltloss.distributed import add_classes, class_mesh, in_one_piece, parallelize
from ltloss.distributed.layout import Layout, local
from ltloss.distributed.sampling import ClassSampler
from ltloss.functional import margin_cross_entropy
from ltloss.testing import problem, relative_error

pytestmark = pytest.mark.slow

CASE = Case("LinearSoftmaxLoss", 11, ((5, 2), (0, 6)))


def _bias(module: Any) -> Tensor:
    assert isinstance(module, LinearSoftmaxLoss)
    assert module.bias is not None
    return module.bias


def _trained(rank: int | None, data: int = 1) -> dict[str, Tensor]:
    """Gradients, three more classes, predictions and logits."""
    module = build(CASE)
    if rank is not None:
        if rank:  # the values of rank 0 count
            _bias(module).data.zero_()
        module = parallelize(module, class_mesh(data))
    for step in range(2):
        features, labels = batch(CASE, step)
        rows = slice(None) if rank is None else part(CASE, step, rank)
        torch.autograd.backward(module(features[rows], labels[rows]))
    found = {"weight": whole(module.weight.grad), "bias": _bias(module).grad}
    larger = add_classes(module, 3, log_prior=torch.zeros(14))
    assert _bias(larger)[11:].tolist() == [0.0] * 3
    assert torch.equal(_bias(larger)[:11], _bias(module))
    _bias(larger).data[11:] = torch.tensor([3.0, -2.0, 9.0])
    start, stop = Layout.of(larger.weight).span()
    local(larger.weight)[max(0, 11 - start) : stop - start] = 0.1  # drawn anew, otherwise on each number of ranks
    queries = problem(4, 11, DIM, dtype=torch.float32, seed=5)[0]
    cosine, index = larger.predict(queries, k=5)
    found |= {"cosine": cosine, "index": index, "logits": in_one_piece(larger).logits(queries).detach()}
    return {**found, "own logits": larger.logits(queries).detach()}


def _both(rank: int) -> list[dict[str, Tensor]]:
    return [_trained(rank), _trained(rank, 2)]


def test_spread_over_ranks_it_is_that_of_one_process() -> None:
    one = _trained(None)
    assert one["index"][:, 0].tolist() == [13] * 4
    assert one["cosine"].max() < 1.0
    for meshes in world.run(_both, 2):
        for found in meshes:
            assert found.keys() == one.keys()
            assert torch.equal(found.pop("index"), one["index"])
            for name, value in found.items():
                assert relative_error(value, one[name]) <= 2e-5, name


def test_a_sample_of_the_classes_has_the_gradient_of_its_biases() -> None:
    head, dense = parallelize(build(CASE), None, sample_rate=0.5), build(CASE)
    assert head.sampler is not None
    features, _, labels = problem(4, 11, DIM, dtype=torch.float32)
    shard = ClassSampler(0.5, 0, True).draw(labels, dense.weight, Layout.of(dense.weight))
    assert shard.index is not None
    assert shard.correction is not None
    prior = torch.full((11,), -torch.inf).index_put((shard.index,), dense.log_prior[shard.index] + shard.correction)
    loss = head(features, labels)
    loss.backward()
    expected = margin_cross_entropy(
        features, dense.weight, labels, scale=1.0, normalize_features=False, normalize_prototypes=False,
        bias=_bias(dense), log_prior=prior,
    )  # fmt: skip
    expected.backward()
    assert relative_error(loss, expected) <= 1e-6
    assert relative_error(_bias(head).grad, _bias(dense).grad) <= 1e-5
    assert relative_error(head.weight.grad, dense.weight.grad) <= 1e-5
    assert _bias(head).grad.nonzero()[:, 0].tolist() == shard.index.tolist()


def _drawn(rank: int) -> tuple[Tensor, ...]:
    torch.manual_seed(rank)  # rank 0's decides
    head = parallelize(LinearSoftmaxLoss(4000, DIM, device="meta"), class_mesh())
    first = whole(head.weight), _bias(head).detach().clone()
    head.reset_parameters()
    return *first, whole(head.weight), _bias(head).detach()


def test_it_is_drawn_as_a_linear_layer() -> None:
    found, others = world.run(_drawn, 2)
    assert all(torch.equal(*pair) for pair in zip(found, others, strict=True))
    bound = DIM**-0.5
    for drawn in found:
        assert 0.99 * bound < drawn.abs().max() <= bound
        assert abs(drawn.std() * 3**0.5 / bound - 1.0) < 0.03  # 4000 draws of a bias
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])
