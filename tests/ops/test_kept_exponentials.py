"""Exponentials kept for the backward: what it costs in precision and in memory, and when nothing is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.interpreter import nearest_bfloat16, quick_interpreter
from helpers.kernel_problems import tiny_tiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltloss
from ltloss import reference
from ltloss.distributed import parallelize
from ltloss.functional import margin_cross_entropy
from ltloss.optim import PrototypeSGD
from ltloss.testing import (
    FAMILY,
    MODULES,
    NOT_A_DERIVATIVE,
    Outcome,
    Problem,
    check_loss,
    outcome,
    problem,
    relative_error,
)

ROOMY = 1 << 30
BACKENDS = ("torch", "triton")
HALF_UNIT = 2.0**-8  # of a bfloat16, relative
FLOAT32 = 2e-5  # what the products and exponents of the float32 path round besides, relative to the same bound


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[ltloss.runtime.Backend]:
    """Chunked PyTorch, or what a test asks for; the kernels in tiles that little problems cross many edges of."""
    name = getattr(request, "param", "torch")
    with contextlib.ExitStack() as stack:
        if name == "triton":
            pytest.importorskip("triton")
            if torch.cuda.is_available():
                pytest.skip("interpreted only: tensors here are the CPU's")
            for context in (quick_interpreter(), nearest_bfloat16(), tiny_tiles(), np.errstate(all="ignore")):
                stack.enter_context(context)
        stack.enter_context(ltloss.use_backend(name))
        yield name


@contextlib.contextmanager
def kept(limit: int = ROOMY) -> Iterator[list[str]]:
    """Keep exponentials in this block, and name the operators of ours that run in it."""
    with ltloss.use_workspace(limit, keep_exponentials=True), _Operators() as seen:
        yield seen.names


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ltloss":
            self.names.append(func.name().removeprefix("ltloss::").removesuffix(f"_{ltloss.current_backend()}"))
        return func(*args, **(kwargs or {}))


KEEPING = ["margin_cross_entropy_keeping", "logsumexp_gradients_of_kept"]
PLAIN = ["margin_cross_entropy", "logsumexp_gradients"]


def _both(given: Problem, upstream: Tensor | None = None, **options: Any) -> tuple[Outcome, Outcome]:
    """Without and with what is kept."""
    plain = outcome(given, upstream, **options)
    with kept() as names:
        found = outcome(given, upstream, **options)
    assert names == KEEPING
    return plain, found


def _check(given: Problem, options: dict[str, Any]) -> None:
    """Each gradient to half a unit of what it is a sum of.

    A row of the gradient of the logits has entries a·p_c besides the target's, with Σp = 1 and |a| at most the weight
    ω of the sample. Rounded, they move ∂L/∂u by at most ω half units and ∂L/∂ŵ by the sum of ω·‖u‖ half units. Neither
    the way through the lengths nor a smoothing makes that larger.
    """
    options = options | {"reduction": "none"}
    upstream = torch.linspace(-1.0, 2.0, len(given.labels))
    plain, found = _both(given, upstream, **options)
    assert torch.equal(plain.loss, found.loss)
    widened = Problem(given.features.double(), given.prototypes.double(), given.labels)
    exact = outcome(widened, upstream.double(), loss=reference.margin_cross_entropy, **options)
    scale, weight = options.get("scale", 30.0), upstream.double().abs() * (given.labels != -100)
    if "class_weight" in options:
        weight = weight * options["class_weight"][given.labels.clamp_min(0)]
    length = given.features.norm(dim=1).double()
    keeps_length = not options.get("normalize_features", True)
    of_features = weight * scale / (torch.ones_like(length) if keeps_length else length)
    of_prototypes = (weight * scale * (length if keeps_length else 1.0)).sum() / given.prototypes.double().norm(dim=1)
    if not options.get("normalize_prototypes", True):
        lengths = given.prototypes.double().norm(dim=1)
        of_features, of_prototypes = of_features * lengths.max(), of_prototypes * lengths
    for actual, true, size in zip(found[1:], exact[1:], (of_features, of_prototypes), strict=True):
        deviation = (actual.double() - true).norm(dim=1)
        assert bool((deviation <= (HALF_UNIT + FLOAT32) * size).all())


SHAPES = [("torch", (7, 9, 5)), ("torch", (1, 1, 3)), ("torch", (4, 2, 3)), *((one, (20, 30, 16)) for one in BACKENDS)]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("backend", "shape"), SHAPES, indirect=["backend"])
def test_every_loss(name: str, shape: tuple[int, int, int], tiny_blocks: object) -> None:
    _check(problem(*shape, dtype=torch.float32), FAMILY[name](shape[1]))


@pytest.mark.parametrize("name", ["cosine_softmax", "everything", "feature_length_smoothed"])
def test_several_row_blocks_of_the_real_size(name: str) -> None:
    _check(problem(1030, 1500, 8, dtype=torch.float32), FAMILY[name](1500))


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_a_class_far_from_its_sample_keeps_its_precision(scale: float, tiny_blocks: object) -> None:
    """With one sample the gradient of a class is a multiple of one vector: its error is that of one exponential."""
    _, prototypes, _ = problem(1, 40, 4, dtype=torch.float32)
    given = Problem(prototypes[3:4].clone(), prototypes, torch.tensor([3]))  # exponents down to -2·scale
    options = {"scale": scale, "cosine_margin": 0.9}
    _, found = _both(given, **options)
    exact = outcome(
        Problem(*(t.double() for t in given[:2]), given.labels), loss=reference.margin_cross_entropy, **options
    )
    others = torch.arange(40) != 3
    size = exact.prototypes.norm(dim=1)
    reached = others & (size > 1e-30)
    assert int(reached.sum()) >= 20
    error = (found.prototypes.double() - exact.prototypes).norm(dim=1)
    # Of a far class float32 knows the exponent to 2·scale·2^-24 and the direction by less than its length.
    assert bool((error <= (HALF_UNIT + 8 * scale * 2.0**-24) * size)[reached].all())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_gradient_shows_that_it_was_rounded() -> None:
    plain, found = _both(problem(dtype=torch.float32), angular_margin=0.3)
    assert not torch.equal(plain.prototypes, found.prototypes)
    assert not torch.equal(plain.features, found.features)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient_alone(needs: tuple[bool, bool]) -> None:
    features, prototypes, labels = problem(dtype=torch.float32)
    _, both = _both(problem(dtype=torch.float32))
    features.requires_grad_(needs[0]), prototypes.requires_grad_(needs[1])
    with kept():
        margin_cross_entropy(features, prototypes, labels).backward()
    for leaf, asked, expected in zip((features, prototypes), needs, both[1:], strict=True):
        assert torch.equal(leaf.grad, expected) if asked else leaf.grad is None


def test_a_graph_can_be_used_twice() -> None:
    leaves = problem(dtype=torch.float32).leaves()
    with kept():
        loss = margin_cross_entropy(*leaves, angular_margin=0.3)
    first = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
    torch.autograd.grad(loss, leaves[:2], torch.tensor(-3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves[:2])
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_rows(value: float, tiny_blocks: object) -> None:
    """NaN and infinity in a sample that counts end as they do otherwise; in one that is ignored they are not seen."""
    features, prototypes, labels = problem(dtype=torch.float32)
    features[1] = value
    plain, found = _both(Problem(features, prototypes, labels))
    assert not found.features[1].any()
    assert bool(found.prototypes.isfinite().all())
    assert relative_error(found.prototypes, plain.prototypes) <= HALF_UNIT
    labels[1] = 2
    plain, found = _both(Problem(features, prototypes, labels), reduction="sum")
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NOT_A_DERIVATIVE])
def test_every_law_holds(name: str) -> None:
    with kept():
        check_loss(lambda c, d: MODULES[name](c, d))


class _Saved:
    """Bytes that a graph holds for its backward, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def _saved(given: Problem) -> int:
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        margin_cross_entropy(*given)
    return saved.bytes


def test_the_limit_holds(tiny_blocks: object) -> None:
    given = problem(7, 9, 5, dtype=torch.float32).leaves()
    without, decisions = _saved(given), set()
    for limit in range(1, 400, 7):
        with kept(limit) as names:
            extra = _saved(given) - without
        decisions.add(bool(extra))
        assert 0 <= extra <= limit
        assert names == (KEEPING if extra else PLAIN)[:1]
    assert decisions == {False, True}


@pytest.mark.parametrize("why", ["not asked", "float64", "too large", "no rows"])
def test_nothing_is_kept(why: str) -> None:
    given = problem(0 if why == "no rows" else 7, dtype=torch.float64 if why == "float64" else torch.float32)
    expected = outcome(given, angular_margin=0.2)
    limit = 100 if why == "too large" else ROOMY
    with ltloss.use_workspace(limit, keep_exponentials=why != "not asked"), _Operators() as seen:
        found = outcome(given, angular_margin=0.2)
    assert seen.names == PLAIN
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_switch_is_put_back() -> None:
    with ltloss.use_workspace(ROOMY, keep_exponentials=True):
        assert ltloss.current_keep_exponentials()
        with ltloss.use_workspace(ROOMY):
            assert not ltloss.current_keep_exponentials()
        assert ltloss.current_keep_exponentials()
    assert not ltloss.current_keep_exponentials()


def test_a_loss_without_a_backward_keeps_nothing() -> None:
    with kept() as names:
        margin_cross_entropy(*problem(dtype=torch.float32))
        with torch.no_grad():
            margin_cross_entropy(*problem(dtype=torch.float32).leaves())
    assert names == PLAIN[:1] * 2


def test_the_backward_reads_what_the_forward_kept_whatever_the_switch_says_then() -> None:
    given = problem(dtype=torch.float32).leaves()
    with kept():
        loss = margin_cross_entropy(*given)
    with _Operators() as seen:
        loss.backward()
    assert seen.names == KEEPING[1:]


def _trained(optimizer: Any, sample_rate: float | None = None) -> tuple[Tensor, list[str]]:
    module = ltloss.ArcFaceLoss(9, 5)
    module.load_state_dict({"weight": problem(dtype=torch.float32)[1]}, strict=False)
    if sample_rate is not None:
        module = parallelize(module, None, sample_rate=sample_rate)
    steps = optimizer(module)
    with kept() as names:
        for seed in range(3):
            features, _, labels = problem(dtype=torch.float32, seed=seed)
            steps.zero_grad()
            module(features.requires_grad_(), labels).backward()
            steps.step()
    return module.weight.detach(), names


def test_an_update_inside_the_backward_moves_as_far() -> None:
    inside, names = _trained(lambda module: PrototypeSGD(module, lr=0.1, momentum=0.9))
    outside, _ = _trained(lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    assert names == KEEPING[:1] * 3
    assert relative_error(inside, outside) <= 1e-6  # the same rounded gradients


def test_a_shard_keeps_its_own_part() -> None:
    """0.999 of nine classes, rounded up, are all of them, but take the way of a sample."""
    whole, _ = _trained(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    shard, names = _trained(lambda module: torch.optim.SGD(module.parameters(), lr=0.1), 0.999)
    assert {"logsumexp_stats_keeping", "logsumexp_gradients_of_kept"} <= set(names)
    assert relative_error(shard, whole) <= 1e-5
