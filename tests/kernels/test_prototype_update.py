"""Prototypes that move in the kernel which makes their gradient: torch.optim in float64 on the stored gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.kernel_problems import DEVICE
from helpers.random_kernels import random_kernel
from ltloss_kernels.config import chunking, tile_table
from torch import Tensor

import ltloss
from ltloss import ArcFaceLoss
from ltloss.distributed.layout import Layout
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.optim.prototype_optimizer import PrototypeOptimizer
from ltloss.optim.rounding import random_bits, round_stochastically

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLASSES, SEED = 70, (1 << 40) + 5

Build = Callable[..., PrototypeOptimizer]
Options = dict[str, Any]
State = dict[str, Tensor]

RULES: dict[str, tuple[Build, Options]] = {
    "sgd": (PrototypeSGD, {"lr": 0.1}),
    "momentum": (PrototypeSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (PrototypeSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "max_class_norm": 0.05}),
    "adamw": (PrototypeAdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": (PrototypeAdagrad, {"lr": 0.1, "weight_decay": 0.01}),
}
# Dtypes of the prototypes and of the state, and how what is bfloat16 is written.
STORAGE = (
    (F32, F32, None),
    (F32, BF16, None),
    (BF16, F32, "stochastic"),
    (BF16, BF16, "stochastic"),
    (BF16, BF16, "nearest"),
    (BF16, F32, "kahan"),
)


def head_and_optimizer(rule: str, width: int, storage: Any = STORAGE[0], **options: Any) -> tuple[Any, Any]:
    """A loss with prototypes on the device, and the optimizer that moves them."""
    torch.manual_seed(0)
    head = ArcFaceLoss(CLASSES, width).to(DEVICE, storage[0])
    build, settings = RULES[rule]
    return head, build(head, **{**settings, "state_dtype": storage[1], "rounding": storage[2], "seed": SEED, **options})


def batch(samples: int, width: int, step: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Features with a gradient, and labels; another batch each step."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(samples, width, generator=generator).to(DEVICE, dtype)
    return features.requires_grad_(), torch.randint(CLASSES, (samples,), generator=generator).to(DEVICE)


def stored_gradient(rule: str, head: Any, features: Tensor, labels: Tensor) -> Tensor:
    """The gradient (C, D) that the kernels make of these prototypes where nothing moves, by the way that they move."""
    found: list[Tensor] = []

    def take(start: int, stop: int, gradient: Tensor) -> None:
        found.append(gradient.clone())

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(PrototypeOptimizer, "begin", return_value=take))
        if rule in ("nesterov", "adagrad"):  # need whole rows, and therefore the projection
            stack.enter_context(mock.patch.object(tile_table, "prototype_gradient_tile", return_value=None))
        head(features, labels).backward()
    gradient = torch.cat(found).double().cpu()
    norm = gradient.norm(dim=1, keepdim=True)
    return torch.nn.functional.normalize(gradient) * norm.clamp(max=RULES[rule][1].get("max_class_norm", torch.inf))


def kept(optimizer: PrototypeOptimizer) -> State:
    """Copies of the prototypes ("") and of their state."""
    (weight,) = optimizer.param_groups[0]["params"]
    return {name: tensor.detach().clone() for name, tensor in {"": weight, **optimizer.state[weight]}.items()}


def exact(rule: str, before: State, gradient: Tensor) -> State:
    """One step of torch.optim in float64 from what is kept: the prototypes, and the state."""
    options = {name: value for name, value in RULES[rule][1].items() if name != "max_class_norm"}
    wide = {name: tensor.double().cpu() for name, tensor in before.items()}
    weight = torch.nn.Parameter(wide[""] + wide.get("compensation", 0.0))
    weight.grad = gradient
    if rule == "adagrad":
        return _row_wise(weight, wide["sum"], **options)
    kind = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    optimizer = kind([weight], **options)
    if before["step"]:
        optimizer.state[weight] = {name: wide[name].clone() for name in wide if name not in ("", "compensation")}
        if rule == "adamw":
            optimizer.state[weight]["step"] = before["step"].float().cpu().clone()
    optimizer.step()
    state = {name: value for name, value in optimizer.state[weight].items() if name != "step"}
    return {"": weight.detach(), **{name: value for name, value in state.items() if value is not None}}


def _row_wise(weight: Tensor, total: Tensor, lr: float, weight_decay: float) -> State:
    """Adagrad on one number a class, the root mean square of its gradient, whose path the class follows."""
    assert weight.grad is not None
    gradient = weight.grad + weight_decay * weight.detach()
    size = gradient.square().mean(1).sqrt()
    number = torch.nn.Parameter(torch.zeros_like(size))
    optimizer = torch.optim.Adagrad([number], lr=lr, eps=1e-10)
    optimizer.state[number]["sum"] = total.clone()
    number.grad = size
    optimizer.step()
    moved = weight.detach() + (number.detach() / size)[:, None] * gradient
    return {"": moved, "sum": optimizer.state[number]["sum"]}


def rounded(values: Tensor, like: Tensor, rounding: str, step: int, stream: int, first: int) -> Tensor:
    """Float64 ``values`` as they are written."""
    if like.dtype == F32:
        return values.float()
    if rounding == "nearest":
        return values.to(BF16)
    width = values[0].numel()
    bits = random_bits(range(first, first + len(values)), width, SEED, step, stream).reshape(values.shape)
    out = torch.empty(values.shape, dtype=BF16)
    round_stochastically(values.float().contiguous(), bits, out)
    return out


def sizes(rule: str, name: str, before: State, truth: State, gradient: Tensor) -> Tensor:
    """Of the numbers that a float32 sum is made of: what it may lose is some units of their last place."""
    size = before[name].double().cpu().abs() + truth[name].abs()
    options = RULES[rule][1]
    if rule in ("adamw", "adagrad"):
        return size + options["lr"] if name == "" else size
    return size + gradient.abs() + options.get("weight_decay", 0.0) * truth[""].abs()


def wrong(rule: str, rounding: str | None, before: State, gradient: Tensor, after: State, first: int = 0) -> list[str]:
    """What is not written as the rounding of the exact value, give or take some units of float32."""
    truth = exact(rule, before, gradient)
    step, problems = int(after["step"]), []
    kahan = "compensation" in after
    for stream, name in enumerate(["", *(one for one in after if one not in ("", "step", "compensation"))]):
        found, value = after[name].cpu(), truth[name]
        near = 2.0**-21 * sizes(rule, name, before, truth, gradient)
        way = "nearest" if rounding == "nearest" or (kahan and stream == 0) else "stochastic"
        low, high = (rounded(value + sign * near, found, way, step, stream, first).double() for sign in (-1, 1))
        if not ((low <= found.double()) & (found.double() <= high)).all():
            problems.append(name or "prototypes")
    if kahan:
        left = truth[""] - after[""].double().cpu()
        error = (after["compensation"].double().cpu() - left).abs()
        if not (error <= 2.0**-8 * left.abs() + 2.0**-21 * sizes(rule, "", before, truth, gradient)).all():
            problems.append("compensation")
    return problems


def check_steps(head: Any, optimizer: Any, rule: str, samples: int, dtype: torch.dtype = F32, first: int = 0) -> None:
    """Three steps, each from what the one before has left."""
    width = head.weight.shape[1]
    for step in range(3):
        features, labels = batch(samples, width, step, dtype)
        gradient = stored_gradient(rule, head, features, labels)
        of_features, features.grad = features.grad, None
        before = kept(optimizer)
        head(features, labels).backward()
        optimizer.step()
        after = kept(optimizer)
        assert after["step"] == step + 1
        assert torch.equal(features.grad, of_features)
        assert wrong(rule, optimizer.rounding, before, gradient, after, first) == []
        assert not torch.equal(after[""], before[""])


@pytest.fixture
def in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every update that the kernels were given; fails a test whose prototypes moved in another way."""
    found: list[Any] = []
    usual = PrototypeOptimizer._in_kernels

    def noted(self: Any, *given: Any) -> Any:
        found.append(usual(self, *given))
        assert found[-1] is not None
        return found[-1]

    monkeypatch.setattr(PrototypeOptimizer, "_in_kernels", noted)
    return found


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_and_storage(rule: str, storage: Any, in_the_kernel: list[Any]) -> None:
    check_steps(*head_and_optimizer(rule, 20, storage), rule, samples=9)
    assert len(in_the_kernel) == 3


@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[3]], ids=str)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("width", [5, 32, 100])
@pytest.mark.parametrize("rule", ["momentum", "adamw", "adagrad"])
def test_each_size(
    rule: str, width: int, many: bool, storage: Any, in_the_kernel: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few samples move prototypes in the product's tiles where rows can be read in place, many in the projection."""
    if many:
        monkeypatch.setattr(tile_table, "FEW_SAMPLES", 0)
    check_steps(*head_and_optimizer(rule, width, storage), rule, samples=20)
    assert len(in_the_kernel) == 3


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_float16_features(rule: str, in_the_kernel: list[Any]) -> None:
    """Prototypes go into the product as scaled copies, and gradients come in another unit."""
    check_steps(*head_and_optimizer(rule, 20), rule, samples=9, dtype=F16)
    assert len(in_the_kernel) == 3


def test_classes_of_a_later_rank_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer("momentum", 20, STORAGE[3])
    monkeypatch.setattr(Layout, "span", lambda self: (1 << 33, (1 << 33) + CLASSES))
    check_steps(head, optimizer, "momentum", samples=9, first=1 << 33)


@pytest.mark.parametrize("width", [1, 16, 100])
@pytest.mark.parametrize("first", [0, 12_345_678_901])
def test_random_numbers_are_those_of_the_host(first: int, width: int) -> None:
    """In tiles of 32 columns, whatever the tile."""
    classes, seed, step, stream = 37, (1 << 62) + 11, 1 << 20, 2
    found = torch.full((classes, width), -1, dtype=torch.int32, device=DEVICE)
    grid = (chunking.ceil_div(classes, 16), chunking.ceil_div(width, 32))
    random_kernel[grid](found, classes, width, first, seed, step, STREAM=stream, ROWS=16, COLUMNS=32)
    bits = random_bits(range(first, first + classes), width, seed, step, stream)
    assert torch.equal(found.cpu(), bits.to(torch.int32) + (1 << 15))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("many", [False, True])
def test_a_step_that_is_not_finite_leaves_every_byte(rule: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        monkeypatch.setattr(tile_table, "FEW_SAMPLES", 0)
    head, optimizer = head_and_optimizer(rule, 20, STORAGE[2])
    for step, upstream in enumerate((1.0, float("nan"), float("inf"), 1.0)):
        before = kept(optimizer)
        head(*batch(9, 20, step)).backward(torch.tensor(upstream, device=DEVICE))
        optimizer._moved = False
        after = kept(optimizer)
        finite = upstream == 1.0
        for name in after:
            one, other = (numbers[name].reshape(-1).view(torch.uint8) for numbers in (before, after))
            assert torch.equal(one, other) != finite, name
    assert optimizer.skipped_steps == 2
    assert after["step"] == 2


@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[3]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_slabs_change_no_bit(rule: str, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_LEAST_CLASSES", 16)
    found = []
    for workspace in (256 << 20, 1 << 14, 1):
        head, optimizer = head_and_optimizer(rule, 20, storage)
        with ltloss.use_workspace(workspace):
            for step in range(3):
                head(*batch(9, 20, step)).backward()
                optimizer.step()
        found.append(kept(optimizer))
    for other in found[1:]:
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_a_learning_rate_on_the_device_is_read_each_step(rule: str) -> None:
    """As a scheduler sets it: filled in place."""
    rates = (0.1, 0.02, 0.0)
    lr = torch.tensor(rates[0], device=DEVICE)
    found = []
    for given in (rates[0], lr):
        head, optimizer = head_and_optimizer(rule, 20, lr=given)
        for step, rate in enumerate(rates):
            (group,) = optimizer.param_groups
            if given is lr:
                lr.fill_(rate)
                assert group["lr"] is lr
            else:
                group["lr"] = rate
            head(*batch(9, 20, step)).backward()
            optimizer.step()
        found.append(kept(optimizer))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("rule", ["nesterov", "adamw", "adagrad"])
def test_the_scale_of_a_scaler_is_divided_out(rule: str) -> None:
    """A power of two changes no bit."""
    found = []
    for scale in (1.0, 2.0**10):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        head, optimizer = head_and_optimizer(rule, 20, grad_scaler=scaler)
        for step in range(3):
            scaler.scale(head(*batch(9, 20, step))).backward()
            optimizer.step()
        found.append(kept(optimizer))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
