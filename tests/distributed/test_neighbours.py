"""Hard negatives in a sample of the classes: which they are, how old, and that the sum stays unbiased."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import world
from helpers.cases import DIM
from helpers.refusals import refused
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ltloss
from ltloss import reference
from ltloss.distributed import (
    DistributedError,
    SampledSGD,
    add_classes,
    class_mesh,
    load_checkpoint,
    parallelize,
    save_checkpoint,
)
from ltloss.distributed.layout import Layout, gathered, local
from ltloss.distributed.neighbours import Neighbours
from ltloss.distributed.sampling import ClassSampler
from ltloss.distributed.top_k import top_k
from ltloss.extend import logsumexp_stats
from ltloss.interop import export_safetensors, import_safetensors
from ltloss.optim import PrototypeSGD
from ltloss.testing import problem, relative_error

CLASSES = 40
LABELS = torch.tensor([3, 7, 7, -100, 39])
BATCH = [3, 7, 39]


def _prototypes(dtype: torch.dtype = torch.float32) -> Tensor:
    return problem(1, CLASSES, DIM, dtype=dtype, seed=3)[1]


def _head(mesh: Any = None, **options: Any) -> Any:
    head = ltloss.CosFaceLoss(CLASSES, DIM, scale=8.0)
    head.load_state_dict({"weight": _prototypes()})
    return parallelize(head, mesh, **{"sample_rate": 0.5, "hard_negatives": 3, "refresh": 2} | options)


def _dense(prototypes: Tensor, classes: list[int], count: int) -> Tensor:
    """(C,): the largest cosine to one of the classes whose neighbour it is, by all C×C cosines in float64."""
    unit = torch.nn.functional.normalize(prototypes.double())
    cosine = (unit @ unit.t()).fill_diagonal_(-2.0)
    nearest = torch.full((len(prototypes),), -torch.inf, dtype=torch.float64)
    for one in classes:
        for other in cosine[one].topk(count).indices:
            nearest[other] = max(nearest[other], cosine[one, other])
    return nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, CLASSES - 1])
def test_the_neighbours_are_those_of_all_cosines(dtype: torch.dtype, count: int) -> None:
    prototypes = _prototypes(dtype)
    found = Neighbours(count, 1).cosines(LABELS, 0, prototypes, Layout.of(prototypes))
    torch.testing.assert_close(found, _dense(prototypes, BATCH, count), atol=1e-6, rtol=0.0)


def test_a_class_is_never_its_own_neighbour() -> None:
    """Not among its copies either, of which the search names the lowest first; nor where its prototype is zero."""
    prototypes = torch.eye(8)[[0, 0, 0, 0, 0, 1, 2, 3]]
    prototypes[7] = 0.0
    layout = Layout.of(prototypes)
    for one, expected in ((4, [0, 1]), (0, [1, 2]), (7, [0, 1])):
        found = Neighbours(2, 1).cosines(torch.tensor([one]), 0, prototypes, layout)
        assert found.isfinite().nonzero()[:, 0].tolist() == expected


def _draws(steps: int, **options: Any) -> list[Any]:
    prototypes = _prototypes()
    sampler = ClassSampler(0.5, 0, True, **{"hard_negatives": 3, "refresh": 1} | options)
    shards = []
    for sampler.step in range(steps):
        shards.append(sampler.draw(LABELS, prototypes, Layout.of(prototypes)))
    return shards


def test_the_hardest_are_certain_and_leave_half_of_the_places() -> None:
    """20 places, 3 of the batch: at most 8 of the 17 others are hard, those with the largest cosines."""
    for count, hard in ((1, 3), (2, 6), (20, 8)):
        cosine = _dense(_prototypes(), BATCH, count)
        cosine[BATCH] = -torch.inf
        hardest = cosine.topk(min(hard, int(cosine.isfinite().sum()))).indices.tolist()
        shards = _draws(30, hard_negatives=count)
        drawn = [set(shard.index.tolist()) for shard in shards]
        assert set.intersection(*drawn) == {*BATCH, *hardest}
        assert set.union(*drawn) == set(range(CLASSES))
        certain = len({*BATCH, *hardest})
        for shard in shards:
            added = dict(zip(shard.index.tolist(), shard.correction.tolist(), strict=True))
            assert len(added) == 20
            assert all(added[one] == 0.0 for one in {*BATCH, *hardest})
            chance = (20 - certain) / (CLASSES - certain)
            assert sorted(added.values())[certain:] == pytest.approx([-math.log(chance)] * (20 - certain))


def test_the_sum_of_exponentials_stays_unbiased() -> None:
    """Of the other classes of each sample, over many draws, against all classes in float64."""
    features, prototypes, labels = problem(4, CLASSES, DIM, seed=5, ignored=False)
    sums: dict[bool, list[Tensor]] = {True: [], False: []}
    for unbiased, found in sums.items():
        sampler = ClassSampler(0.25, 0, unbiased, hard_negatives=2, refresh=1)
        for sampler.step in range(500 if unbiased else 50):
            shard = sampler.draw(labels, prototypes, Layout.of(prototypes))
            found.append(logsumexp_stats(features, prototypes, labels, scale=4.0, shard=shard).logsumexp.exp())
    exact = reference.cosine_logsumexp(features, prototypes, labels, scale=4.0)[0].exp()
    corrected, plain = (torch.stack(found) for found in sums.values())
    deviation = corrected.std(0) / len(corrected) ** 0.5
    assert bool(((corrected.mean(0) - exact).abs() < 4 * deviation).all())
    assert bool((exact - plain.mean(0) > 8 * deviation).all())  # which sees a correction that is missing


def test_all_classes_give_the_exact_step() -> None:
    """0.999 of 40 classes, rounded up, are all of them, but take the way of a sample."""
    sampled, plain = (
        _head(sample_rate=0.999),
        parallelize(_head().__class__.__bases__[1](CLASSES, DIM, scale=8.0), None),
    )
    plain.load_state_dict({"weight": _prototypes()})
    optimizers = SampledSGD(sampled, lr=0.1), torch.optim.SGD([plain.weight], lr=0.1)
    for step in range(4):
        features, _, labels = problem(8, CLASSES, DIM, dtype=torch.float32, seed=step)
        for module, optimizer in zip((sampled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(features, labels).backward()
            optimizer.step()
    assert relative_error(sampled.weight, plain.weight) <= 1e-5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many classes each search was for."""
    counts: list[int] = []

    def counted(features: Tensor, *given: Any) -> Any:
        counts.append(len(features))
        return top_k(features, *given)

    monkeypatch.setattr("ltloss.distributed.neighbours.top_k", counted)
    return counts


def test_a_class_is_searched_once_in_so_many_steps(asked: list[int]) -> None:
    prototypes = _prototypes()
    known, layout = Neighbours(3, 3), Layout.of(prototypes)

    def searched(step: int, *labels: int) -> list[int]:
        asked.clear()
        known.cosines(torch.tensor(labels), step, prototypes, layout)
        return asked.copy()

    assert searched(0, 1, 2) == [2]
    assert searched(0, 1, 2) == []  # as a recomputation asks
    assert searched(1, 2, 3, 3) == [1]  # two is known, three asked once
    assert searched(2, 1, 2, 3) == []
    assert searched(3, 1, 2, 3) == [2]  # three is younger
    assert searched(4, 3) == [1]
    assert searched(5, -100) == []


def test_neighbours_are_as_old_as_they_may_be() -> None:
    old, new = _prototypes(), problem(1, CLASSES, DIM, dtype=torch.float32, seed=8)[1]
    layout, known = Layout.of(old), Neighbours(3, 2)
    found = [known.cosines(LABELS, step, new if step else old, layout) for step in range(3)]
    assert torch.equal(found[1], found[0])
    torch.testing.assert_close(found[2], _dense(new, BATCH, 3), atol=1e-6, rtol=0.0)


def _train(head: Any, steps: range, rank: int = 0, ranks: int = 1, optimizer: Any = None) -> list[Any]:
    """The loss and the drawn classes of each step, and the weight after them."""
    optimizer = optimizer or SampledSGD(head, lr=0.3)
    seen: list[Any] = []
    for step in steps:
        features, _, labels = problem(8, CLASSES, DIM, dtype=torch.float32, seed=step % 3)
        optimizer.zero_grad()
        loss = head(features[rank::ranks].requires_grad_(), labels[rank::ranks])
        loss.backward()
        if head.weight.grad is not None:
            seen.append(local(head.weight.grad).any(1).nonzero()[:, 0].tolist())
        seen.append(float(loss.detach()))
        optimizer.step()
    return [*seen, gathered(head.weight) if hasattr(head.weight, "device_mesh") else head.weight.detach().clone()]


def _same(one: list[Any], other: list[Any]) -> bool:
    return one[:-1] == other[:-1] and torch.equal(one[-1], other[-1])


def test_training_repeats_and_can_be_copied_and_pickled() -> None:
    first = _head(refresh=4)
    _train(first, range(3))  # so that the table is in use
    pickled = io.BytesIO()
    torch.save(first, pickled)
    pickled.seek(0)
    others = [copy.deepcopy(first), torch.load(pickled, weights_only=False), _head(refresh=4)]
    _train(others[-1], range(3))
    expected = _train(first, range(3, 7))
    assert all(_same(_train(other, range(3, 7)), expected) for other in others)
    fresh = _head(refresh=4)
    fresh.load_state_dict(first.state_dict())
    assert fresh.sampler.neighbours is not first.sampler.neighbours


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_same_classes(reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        head = _head(refresh=1)
        features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
        losses = []
        for piece in (slice(0, 3), slice(3, 6)):  # both before a backward
            given = features[piece].requires_grad_(), labels[piece]
            losses.append(checkpoint(head, *given, use_reentrant=reentrant) if checkpointed else head(*given))
        sum(losses).backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_compiled() -> None:
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        head = _head()
        call = torch.compile(head, backend="aot_eager") if compiled else head
        features, _, labels = problem(6, CLASSES, DIM, dtype=torch.float32)
        call(features.requires_grad_(), labels).backward()
        found.append(head.weight.grad)
    torch.testing.assert_close(*found)


def test_with_a_fused_update() -> None:
    heads = _head(), _head()
    stored = _train(heads[0], range(4))
    fused = _train(heads[1], range(4), optimizer=PrototypeSGD(heads[1], lr=0.3))
    assert stored[1:-1:2] == pytest.approx(fused[:-1], rel=1e-4)
    assert relative_error(fused[-1], stored[-1]) <= 1e-5


def test_in_inference_mode_and_after_it() -> None:
    head = _head()
    features, _, labels = problem(8, CLASSES, DIM, dtype=torch.float32)
    with torch.inference_mode():
        head(features, labels)
    head.sampler.step += 5
    head(features, labels).backward()


@pytest.mark.parametrize("how", ["load_state_dict", "import_safetensors", "reset_parameters"])
def test_other_prototypes_are_searched_anew(how: str, tmp_path: Path) -> None:
    head, other = _head(refresh=1000), ltloss.CosFaceLoss(CLASSES, DIM, scale=8.0)
    _train(head, range(1))
    assert head.sampler.neighbours.tensors(head.layout)
    if how == "reset_parameters":
        head.reset_parameters()
    elif how == "load_state_dict":
        head.load_state_dict(other.state_dict())
    else:
        pytest.importorskip("safetensors")
        export_safetensors(other, tmp_path / "head")
        import_safetensors(head, tmp_path / "head")
    assert not head.sampler.neighbours.tensors(head.layout)


def test_more_classes_are_searched_anew() -> None:
    head = _head()
    _train(head, range(2))
    larger = add_classes(head, 5)
    features, _, _ = problem(2, CLASSES, DIM, dtype=torch.float32)
    larger(features, torch.tensor([CLASSES + 4, 0])).backward()
    assert larger.sampler.neighbours.tensors(larger.layout)["neighbour"].shape == (CLASSES + 5, 3)


def _on_ranks(rank: int, data: int) -> tuple[Tensor, list[int], list[Any]]:
    head = _head(class_mesh(data))
    layout, known, messages = head.layout, Neighbours(3, 1), []
    for step in (0, 0, 1):
        with world.Collectives() as sent:
            found = known.cosines(LABELS, step, head.weight, layout)
        messages.append(len(sent.calls))
    return gathered(layout.place(found)), messages, _train(head, range(5), rank, layout.ranks)


@pytest.mark.parametrize(("ranks", "data"), [(2, 1), (4, 2)])
def test_ranks_find_what_one_process_finds(ranks: int, data: int) -> None:
    expected = _dense(_prototypes(), BATCH, 3)
    results = world.run(_on_ranks, ranks, data)
    for found, messages, trained in results:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
        assert messages == [3 + data, 1, 3 + data]  # the search and the look-up, the look-up, both
        assert trained[1:-1:2] == results[0][2][1:-1:2]  # the losses
        assert torch.equal(trained[-1], results[0][2][-1])
    for group in range(1, data):  # which draws what the first draws
        for rank in range(ranks // data):
            assert results[group * (ranks // data) + rank][2][:-1] == results[rank][2][:-1]


def _resumed(rank: int, folder: Path, mesh: bool = True) -> bool:
    made = class_mesh() if mesh else None
    ranks = made.size() if made else 1
    head = _head(made, refresh=4)
    _train(head, range(2), rank, ranks)
    save_checkpoint(folder, {"head": head})
    expected = _train(head, range(2, 7), rank, ranks)
    again = _head(made, refresh=4)
    _train(again, range(1), rank, ranks)  # what it knows is overwritten
    load_checkpoint(folder, {"head": again})
    return _same(_train(again, range(2, 7), rank, ranks), expected)


def test_a_resumed_training_has_the_same_bits(tmp_path: Path) -> None:
    """In the middle of what a class keeps its neighbours for."""
    assert _resumed(0, tmp_path / "one", mesh=False)
    assert all(world.run(_resumed, 2, tmp_path / "two"))
    loaded = []
    for name in ("one", "two"):  # both on one process
        head = _head()
        load_checkpoint(tmp_path / name, {"head": head})
        loaded.append(head.sampler.neighbours.tensors(head.layout)["neighbour"])
        assert loaded[-1].any()
    assert loaded[0].shape == loaded[1].shape


class _Wrapper(torch.nn.Module):
    """Holds what it wraps where DistributedDataParallel does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [_Wrapper, lambda head: torch.nn.ModuleDict({"inner": head})])
def test_a_head_inside_of_a_module_keeps_its_sample(wrap: Any, tmp_path: Path) -> None:
    head, again = _head(), _head()
    _train(head, range(2))
    save_checkpoint(tmp_path / "one", {"all": wrap(head)})
    load_checkpoint(tmp_path / "one", {"all": wrap(again)})
    assert again.sampler.step == head.sampler.step == 2
    known = head.sampler.neighbours.tensors(head.layout)
    assert all(torch.equal(again.sampler.neighbours.tensors(head.layout)[name], known[name]) for name in known)


def test_a_checkpoint_without_these_neighbours_is_searched_anew(tmp_path: Path) -> None:
    for number, options in enumerate(({"hard_negatives": 0}, {"hard_negatives": 5})):
        other = _head(**options)
        _train(other, range(2))
        save_checkpoint(tmp_path / str(number), {"head": other})
        head = _head()
        _train(head, range(2))
        load_checkpoint(tmp_path / str(number), {"head": head})
        assert head.sampler.step == 2
        assert head.sampler.neighbours.tensors(head.layout) == {}
        _train(head, range(2))


def _different(rank: int) -> str:
    with pytest.raises(DistributedError) as caught:
        _head(class_mesh(), hard_negatives=3 + rank)
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    for given in (-1, CLASSES):
        with refused("hard_negatives", "0", str(CLASSES - 1), str(given)):
            _head(hard_negatives=given)
    with refused("hard_negatives", "2.5", error=TypeError):
        _head(hard_negatives=2.5)
    with refused("refresh", "1", "0"):
        _head(refresh=0)
    with refused("hard_negatives=3", "sub_centers=2"):
        parallelize(ltloss.ArcFaceLoss(CLASSES, 4, sub_centers=2), None, sample_rate=0.5, hard_negatives=3)
    with refused("hard_negatives=3", "sample_rate"):
        _head(sample_rate=1.0)
    assert all("same on all ranks" in said for said in world.run(_different, 2))
