"""A sample of the classes: what is drawn, which rows move, and that all of them give the exact step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM
from helpers.refusals import refused
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ltloss
from ltloss.distributed import SampledAdamW, SampledSGD, class_mesh, in_one_piece, parallelize
from ltloss.distributed.layout import Layout, local
from ltloss.distributed.sampling import ClassSampler
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.testing import problem, relative_error

CLASSES = 40


def _head(**options: Any) -> ltloss.PrototypeHead:
    head = ltloss.CosFaceLoss(CLASSES, DIM, scale=8.0, **options)
    head.load_state_dict({"weight": problem(1, CLASSES, DIM, dtype=torch.float32, seed=3)[1]})
    return head


OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (SampledSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "plain sgd": (SampledSGD, torch.optim.SGD, {"lr": 0.1}),
    "adamw": (SampledAdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rate", [1.0, 0.999])
def test_all_classes_give_the_exact_step(name: str, rate: float) -> None:
    """0.999 of 40 classes, rounded up, are all of them, but take the way of a sample."""
    ours, theirs, options = OPTIMIZERS[name]
    sampled, plain = parallelize(_head(), None, sample_rate=rate), _head()
    optimizers = ours(sampled, **options), theirs([plain.weight], **options)
    for step in range(10):
        features, _, labels = problem(8, CLASSES, DIM, dtype=torch.float32, seed=step)
        for module, optimizer in zip((sampled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(features, labels).backward()
            optimizer.step()
    assert relative_error(sampled.weight, plain.weight) <= 1e-5


def _draw(step: int, seed: int = 0, rate: float = 0.25, unbiased: bool = True) -> tuple[Tensor, Tensor | None]:
    sampler = ClassSampler(rate, seed, unbiased)
    sampler.step = step
    prototypes = torch.zeros(CLASSES, DIM)
    shard = sampler.draw(torch.tensor([3, 7, 7, -1]), prototypes, Layout.of(prototypes))
    assert shard.index is not None
    return shard.index, shard.correction


def test_a_draw_is_reproducible_and_has_the_batch() -> None:
    draws = [_draw(step)[0] for step in range(20)]
    for step, index in enumerate(draws):
        assert torch.equal(index, _draw(step)[0])
        assert index.numel() == 10
        assert index.unique().numel() == 10
        assert {3, 7} <= set(index.tolist())
    assert len({tuple(index.tolist()) for index in draws}) == 20
    assert not torch.equal(draws[0], _draw(0, seed=1)[0])
    assert _draw(0, rate=0.01)[0].tolist() == [3, 7]  # more of the batch than the rate asks for


def test_the_correction_makes_the_sum_of_exponentials_unbiased() -> None:
    logits = torch.linspace(-2.0, 2.0, CLASSES, dtype=torch.float64)
    sums, plain = [], []
    for step in range(4000):
        index, prior = _draw(step)
        assert prior is not None
        sums.append(float((logits[index] + prior).exp().sum()))
        plain.append(float(logits[index].exp().sum()))
    mean, exact = torch.tensor(sums).mean(), float(logits.exp().sum())
    deviation = float(torch.tensor(sums).std()) / len(sums) ** 0.5
    assert abs(float(mean) - exact) < 4 * deviation
    assert float(torch.tensor(plain).mean()) < 0.5 * exact  # without it, most of the sum is missing
    assert _draw(0, unbiased=False)[1] is None


def test_the_loss_is_that_of_the_sampled_classes() -> None:
    head, dense = parallelize(_head(), None, sample_rate=0.25), _head()
    assert head.sampler is not None
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
    features.requires_grad_()
    index = ClassSampler(0.25, 0, True).draw(labels, dense.weight, Layout.of(dense.weight)).index
    assert index is not None
    certain = labels[labels >= 0].unique()
    prior = torch.full((CLASSES,), -torch.inf)
    prior[index] = -torch.log(torch.tensor((index.numel() - certain.numel()) / (CLASSES - certain.numel())))
    prior[certain] = 0.0
    expected = ltloss.functional.margin_cross_entropy(
        features, dense.weight, labels, scale=8.0, cosine_margin=0.35, log_prior=prior
    )
    (exact,) = torch.autograd.grad(expected, features, retain_graph=True)
    expected.backward()
    features.grad = None
    loss = head(features, labels)
    loss.backward()
    assert relative_error(loss, expected) <= 1e-6
    assert relative_error(features.grad, exact) <= 1e-5
    assert torch.equal(head.weight.grad.any(1).nonzero()[:, 0], index)
    assert relative_error(head.weight.grad, dense.weight.grad) <= 1e-5
    head.eval()
    assert relative_error(head(features, labels), _head()(features, labels)) <= 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_sampled_rows_are_touched(name: str) -> None:
    ours, _, options = OPTIMIZERS[name]
    head = parallelize(_head(), None, sample_rate=0.25)
    assert head.sampler is not None
    optimizer = ours(head, **options)
    for step in range(5):
        features, _, labels = problem(4, CLASSES, DIM, dtype=torch.float32, seed=step)
        before = head.weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[head.weight].items()}
        optimizer.zero_grad()
        for piece in (slice(0, 2), slice(2, 4)):  # two passes before one step
            head(features[piece], labels[piece]).backward()
        index = head.weight.grad.any(1).nonzero()[:, 0]
        assert 10 <= index.numel() <= 20  # a quarter of 40, drawn twice
        optimizer.step()
        others = torch.ones(CLASSES, dtype=torch.bool)
        others[index] = False
        assert torch.equal(head.weight[others], before[0][others])
        assert bool((head.weight[index] != before[0][index]).any(1).all())
        for key, value in before[1].items():
            assert torch.equal(optimizer.state[head.weight][key][others], value[others])


def _step(order: str, optimizer: str = "sampled") -> tuple[Tensor, Tensor]:
    """One step of training in an order of calls: the gradient that torch sees, and the weight after it."""
    head = parallelize(_head(), None, sample_rate=0.25)
    sgd = SampledSGD(head, lr=0.1) if optimizer == "sampled" else torch.optim.SGD([head.weight], lr=0.1)
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
    head(features, labels)  # a forward without a backward leaves nothing behind
    loss = head(features, labels)
    if order == "forward, optimizer.zero_grad, backward":
        sgd.zero_grad()
    elif order == "forward, module.zero_grad, backward":
        head.zero_grad()
    loss.backward()
    grad = head.weight.grad.clone()
    sgd.step()
    return grad, head.weight.detach()


ORDERS = ["forward, backward", "forward, optimizer.zero_grad, backward", "forward, module.zero_grad, backward"]


@pytest.mark.parametrize("optimizer", ["sampled", "torch"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_calls_trains(order: str, optimizer: str) -> None:
    grad, weight = _step(order, optimizer)
    assert bool(grad.any())
    assert torch.equal(grad, _step(ORDERS[0])[0])
    torch.testing.assert_close(weight, _head().weight.detach() - 0.1 * grad)


def test_the_gradient_is_torchs() -> None:
    head = parallelize(_head(), None, sample_rate=0.25)
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
    head(features, labels).backward()
    once = head.weight.grad.clone()
    assert float(torch.nn.utils.clip_grad_norm_([head.weight], 1e-3)) == pytest.approx(float(once.norm()))
    assert float(head.weight.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
    head.zero_grad()
    assert head.weight.grad is None
    for _ in range(2):  # the same labels in the same step draw the same classes
        head(features, labels).backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


def test_a_grad_scaler_divides_its_scale_out() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        head = parallelize(_head(), None, sample_rate=0.25)
        optimizer = SampledSGD(head, lr=0.1, momentum=0.9)
        features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
        loss = head(features, labels)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(head.weight.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_same_classes(reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        head = parallelize(_head(), None, sample_rate=0.25)
        features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
        leaf, losses = features.requires_grad_(), []
        for piece in (slice(0, 3), slice(3, 6)):  # both before a backward
            given = leaf[piece], labels[piece]
            losses.append(checkpoint(head, *given, use_reentrant=reentrant) if checkpointed else head(*given))
        sum(losses).backward()
        results.append((leaf.grad.clone(), head.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_each_step_and_each_micro_batch_draws_anew() -> None:
    head = parallelize(_head(), None, sample_rate=0.25)
    optimizer = SampledSGD(head, lr=0.1)
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32, ignored=False)
    drawn = []
    for _ in range(3):
        for piece in (slice(0, 3), slice(3, 6)):
            optimizer.zero_grad()
            head(features[piece], labels[piece]).backward()
            drawn.append(tuple(head.weight.grad.any(1).nonzero()[:, 0].tolist()))
        optimizer.step()
    assert len(set(drawn)) == 6
    assert head.sampler.step == 3


class _OfItsOwn(ltloss.PrototypeHead):
    def forward(self, features: Tensor, labels: Tensor, *, shard: Any = None) -> Tensor:
        assert vars(self.weight) == {}
        stats = logsumexp_stats(features, self.weight, labels, scale=self.scale, shard=shard)
        return reduce_losses(margin_losses(stats, cosine_margin=0.35), stats.labels)


def test_a_loss_of_ones_own_is_handed_the_sample() -> None:
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
    own, ours = _OfItsOwn(CLASSES, DIM, scale=8.0), _head()
    own.load_state_dict(ours.state_dict())
    losses = [parallelize(head, None, sample_rate=0.25)(features, labels) for head in (own, ours)]
    torch.testing.assert_close(*losses)


class _WithoutShard(ltloss.PrototypeHead):
    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return ltloss.functional.margin_cross_entropy(features, self.weight, labels)


def test_what_cannot_be_sampled_is_refused() -> None:
    head = _WithoutShard(CLASSES, DIM)
    with refused("shard", error=TypeError):
        parallelize(head, None, sample_rate=0.5)
    features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
    assert torch.equal(head(features, labels), _WithoutShard.forward(head, features, labels))  # all classes, as before
    counts = torch.arange(1, CLASSES + 1)
    with refused("min_angle_weight=0", "0.1"):
        parallelize(ltloss.LongTailLoss.from_counts(counts, DIM), None, sample_rate=0.5)
    parallelize(ltloss.LongTailLoss.from_counts(counts, DIM, min_angle_weight=0.0), None, sample_rate=0.5)


def test_what_cannot_be_sampled_is_refused_later_too() -> None:
    counts = torch.arange(1, CLASSES + 1)
    losses = {"label_smoothing": _head(), "min_angle_weight": ltloss.LongTailLoss.from_counts(counts, DIM)}
    for name, loss in losses.items():
        setattr(loss, name, 0.0)
        head = parallelize(loss, None, sample_rate=0.5)
        with refused(f"{name}=0", "0.2"):
            setattr(head, name, 0.2)
        setattr(in_one_piece(head), name, 0.2)  # of all classes
        setattr(head, name, 0.0)


def _on_ranks(rank: int, data: int) -> Any:
    """Sampled training on ranks: the same draws as from the whole weight, one shard at a time."""
    head = parallelize(_head(), class_mesh(data), sample_rate=0.3, sample_seed=4)
    optimizer = SampledSGD(head, lr=0.1, momentum=0.9)
    losses = []
    for step in range(4):
        features, _, labels = problem(8, CLASSES, DIM, dtype=torch.float32, seed=step)
        mine = slice(rank, None, 4)
        optimizer.zero_grad()
        loss = head(features[mine], labels[mine])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, head.weight.detach().full_tensor(), local(optimizer.state[head.weight]["momentum_buffer"]).shape


def test_sampled_on_ranks() -> None:
    for data in (1, 2):
        found = world.run(_on_ranks, 4, data)
        assert all(other[0] == found[0][0] for other in found)
        assert all(torch.equal(other[1], found[0][1]) for other in found)
        assert found[0][2] == (CLASSES * data // 4, DIM)
        assert found[0][0][-1] != found[0][0][0]
        assert not torch.equal(found[0][1], _head().weight)
