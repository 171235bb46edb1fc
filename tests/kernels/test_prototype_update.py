"""Prototypes that move in the kernel which makes their gradient: torch.optim in float64 on the stored gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.interpreter import products_by_value
from helpers.kernel_problems import DEVICE
from helpers.random_kernels import float8_kernel, random_kernel
from ltloss_kernels import cosine_logsumexp_gradients
from ltloss_kernels.config import chunking, tile_table
from torch import Tensor

import ltloss
from ltloss import ArcFaceLoss
from ltloss.distributed.layout import Layout
from ltloss.float8 import FLOAT8, decoded, power_of_two, scaled_down
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.optim.prototype_optimizer import PrototypeOptimizer
from ltloss.optim.rounding import random_bits, round_stochastically
from ltloss.testing import relative_error

F32, BF16, F16, F8 = torch.float32, torch.bfloat16, torch.float16, FLOAT8
CLASSES, SEED = 70, (1 << 40) + 5
NO_STREAM = ("", "step", "compensation", "exponent")

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
# Dtypes of the prototypes and of the state, and how what is bfloat16 or float8 is written.
STORAGE = (
    (F32, F32, None),
    (F32, BF16, None),
    (BF16, F32, "stochastic"),
    (BF16, BF16, "stochastic"),
    (BF16, BF16, "nearest"),
    (BF16, F32, "kahan"),
    (F8, F32, "stochastic"),
    (F8, BF16, "nearest"),
)


def head_and_optimizer(rule: str, width: int, storage: Any = STORAGE[0], **options: Any) -> tuple[Any, Any]:
    """A loss with prototypes on the device, and the optimizer that moves them."""
    torch.manual_seed(0)
    head = ArcFaceLoss(CLASSES, width, dtype=storage[0]).to(DEVICE)
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
    if head.weight_exponent is not None:  # the loss sees prototypes without it
        gradient /= power_of_two(head.weight_exponent)[:, None].cpu()
    norm = gradient.norm(dim=1, keepdim=True)
    return torch.nn.functional.normalize(gradient) * norm.clamp(max=RULES[rule][1].get("max_class_norm", torch.inf))


def kept(optimizer: PrototypeOptimizer) -> State:
    """Copies of the prototypes (""), of their exponents where they are float8, and of their state."""
    (weight,), head = optimizer.param_groups[0]["params"], optimizer._module()
    tensors = {"": weight, **optimizer.state[weight]}
    if head is not None and head.weight_exponent is not None:
        tensors["exponent"] = head.weight_exponent
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def numbers(state: State) -> State:
    """What is kept, in float64."""
    wide = {name: tensor.double().cpu() for name, tensor in state.items()}
    if (exponent := wide.pop("exponent", None)) is not None:
        wide[""] *= torch.exp2(exponent)[:, None]
    return wide


def exact(rule: str, before: State, gradient: Tensor) -> State:
    """One step of torch.optim in float64 from what is kept: the prototypes, and the state."""
    options = {name: value for name, value in RULES[rule][1].items() if name != "max_class_norm"}
    wide = numbers(before)
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
        return values.float().to(like.dtype)
    width = values[0].numel()
    bits = random_bits(range(first, first + len(values)), width, SEED, step, stream).reshape(values.shape)
    out = torch.empty(values.shape, dtype=like.dtype)
    round_stochastically(values.float().contiguous(), bits, out)
    return out


def sizes(rule: str, name: str, before: State, truth: State, gradient: Tensor) -> Tensor:
    """Of the numbers that a float32 sum is made of: what it may lose is some units of their last place."""
    size = numbers(before)[name].abs() + truth[name].abs()
    options = RULES[rule][1]
    if rule in ("adamw", "adagrad"):
        return size + options["lr"] if name == "" else size
    return size + gradient.abs() + options.get("weight_decay", 0.0) * truth[""].abs()


def wrong(rule: str, rounding: str | None, before: State, gradient: Tensor, after: State, first: int = 0) -> list[str]:
    """What is not written as the rounding of the exact value, give or take some units of float32."""
    truth = exact(rule, before, gradient)
    step, problems = int(after["step"]), []
    kahan = "compensation" in after
    exponent = after.get("exponent")
    for stream, name in enumerate(["", *(one for one in after if one not in NO_STREAM)]):
        found, value = after[name].cpu(), truth[name]
        near = 2.0**-21 * sizes(rule, name, before, truth, gradient)
        if exponent is not None and name == "":
            problems += wrong_exponents(exponent.cpu(), value, near)
            value, near = (one * torch.exp2(-exponent.double().cpu())[:, None] for one in (value, near))
        way = "nearest" if rounding == "nearest" or (kahan and stream == 0) else "stochastic"
        ends = [value + sign * near for sign in (-1, 1)]
        if found.dtype == F8:
            ends = [end.clamp(-448.0, 448.0) for end in ends]
        low, high = (rounded(end, found, way, step, stream, first).double() for end in ends)
        if not ((low <= found.double()) & (found.double() <= high)).all():
            problems.append(name or "prototypes")
    if kahan:
        left = truth[""] - after[""].double().cpu()
        error = (after["compensation"].double().cpu() - left).abs()
        if not (error <= 2.0**-8 * left.abs() + 2.0**-21 * sizes(rule, "", before, truth, gradient)).all():
            problems.append("compensation")
    return problems


def wrong_exponents(exponent: Tensor, rows: Tensor, near: Tensor) -> list[str]:
    """Whether each is the smallest e with max|row| < 448·2^e, give or take what float32 may lose."""
    least, most = ((rows.abs() + sign * near).amax(1) for sign in (-1, 1))
    limit = 448.0 * torch.exp2(exponent.double())
    return [] if bool(((least < limit) & (most >= limit / 2)).all()) else ["exponent"]


def check_steps(
    head: Any, optimizer: Any, rule: str, samples: int, dtype: torch.dtype = F32, first: int = 0, steps: int = 3
) -> None:
    """Each step from what the one before has left: the first has no state yet."""
    width = head.weight.shape[1]
    for step in range(steps):
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


@pytest.mark.parametrize(
    ("many", "storage"), [(False, STORAGE[0]), (True, STORAGE[0]), (True, STORAGE[3]), (True, STORAGE[6])], ids=str
)
@pytest.mark.parametrize("width", [5, 32, 100])
@pytest.mark.parametrize("rule", ["momentum", "adagrad"])
def test_each_size(
    rule: str, width: int, many: bool, storage: Any, in_the_kernel: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few samples move prototypes in the product's tiles where rows can be read in place, many in the projection."""
    if many:
        monkeypatch.setattr(tile_table, "FEW_SAMPLES", 0)
    check_steps(*head_and_optimizer(rule, width, storage), rule, samples=20, steps=2)
    assert len(in_the_kernel) == 2


@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[6]], ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_float16_features(rule: str, storage: Any, in_the_kernel: list[Any]) -> None:
    """Prototypes go into the product as scaled copies, and gradients come in another unit."""
    check_steps(*head_and_optimizer(rule, 20, storage), rule, samples=9, dtype=F16)
    assert len(in_the_kernel) == 3


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("width", [5, 20])
def test_the_gradient_of_float8_prototypes(width: int, dtype: torch.dtype) -> None:
    """Of the numbers that they stand for, against the float64 law."""
    head, _ = head_and_optimizer("sgd", width, STORAGE[6])
    features, labels = batch(9, width, 0, dtype)
    found = stored_gradient("sgd", head, features, labels)
    wide = ArcFaceLoss(CLASSES, width, dtype=torch.float64)
    wide.weight.data = decoded(head.weight.detach().cpu(), head.weight_exponent.cpu()).double()
    with ltloss.use_backend("reference"):
        wide(features.detach().double().cpu(), labels.cpu()).backward()
    assert relative_error(found, wide.weight.grad) <= (5e-6 if dtype == F32 else 2.0**-9)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("size", [2.0**-140, 1e-9, 1.0, 2.0**100])
def test_float8_is_written_as_the_host_writes_it(size: float, rounding: str) -> None:
    """The same bits of rows and exponents: entries of all sizes, ties, zeros of both signs, and rows of zeros."""
    classes, width, first, seed, step = 37, 40, 1 << 35, 7, 3
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(classes, width, generator=generator) * torch.logspace(0, -6, width)
    rows[1], rows[2, ::2], rows[3] = 0.0, -0.0, torch.arange(width) + 0.5
    rows[4], rows[5], rows[6] = 448.0, 447.99997, torch.linspace(1, 33, width) * 2.0**-10  # half units of the lowest
    rows[6, 0] = -440.0
    rows *= size
    weight = torch.empty(classes, width, dtype=F8, device=DEVICE)
    exponent = torch.empty(classes, dtype=torch.int8, device=DEVICE)
    grid = (chunking.ceil_div(classes, 4),)
    given = rows.to(DEVICE), weight, exponent, classes, width, first, seed, step
    float8_kernel[grid](*given, ROUNDING=rounding, ROWS=4, WIDTH=64)
    expected, scaled = scaled_down(rows.clone())
    assert torch.equal(exponent.cpu(), expected)
    if rounding == "nearest":
        written = scaled.to(F8)
    else:
        written = torch.empty(classes, width, dtype=F8)
        round_stochastically(scaled, random_bits(range(first, first + classes), width, seed, step, 0), written)
    assert torch.equal(weight.cpu().view(torch.uint8), written.view(torch.uint8))


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
@pytest.mark.parametrize(("many", "storage"), [(False, STORAGE[2]), (True, STORAGE[2]), (True, STORAGE[6])], ids=str)
def test_a_step_that_is_not_finite_leaves_every_byte(
    rule: str, many: bool, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(tile_table, "FEW_SAMPLES", 0)
    head, optimizer = head_and_optimizer(rule, 20, storage)
    for step, upstream in enumerate((1.0, float("nan"), float("inf"), 1.0)):
        before = kept(optimizer)
        head(*batch(9, 20, step)).backward(torch.tensor(upstream, device=DEVICE))
        optimizer._moved = False
        after = kept(optimizer)
        finite = upstream == 1.0
        for name in after:
            one, other = (state[name].reshape(-1).view(torch.uint8) for state in (before, after))
            assert torch.equal(one, other) != finite or (finite and name == "exponent"), name
    assert optimizer.skipped_steps == 2
    assert after["step"] == 2


def _multiply_add_in_float64(target: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """A library adds in an order that depends on the sizes; this one rounds once, so that the order does not show."""
    product = left.double() @ right.double()
    target.copy_(product if overwrite else target.double() + product)


@pytest.mark.parametrize("storage", [STORAGE[0], STORAGE[3], STORAGE[6]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_slabs_change_no_bit(rule: str, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_LEAST_CLASSES", 16)
    monkeypatch.setattr(cosine_logsumexp_gradients, "multiply_add", _multiply_add_in_float64)
    found = []
    for workspace in (256 << 20, 1 << 14, 1):
        head, optimizer = head_and_optimizer(rule, 20, storage)
        with products_by_value(), ltloss.use_workspace(workspace):
            for step in range(2):
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
