"""The fused update on a GPU: checks of its results, and whole steps timed beside the loss with torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.loss_gpu.measure import Device, waiting_is_an_error
from benchmarks.loss_gpu.search import BF16, FP32, SearchCase
from benchmarks.peers import Shape
from examples.cuda_graph import recorded
from ltloss import ArcFaceLoss
from ltloss.float8 import FLOAT8 as FP8
from ltloss.float8 import decoded
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD
from ltloss.optim.prototype_optimizer import PrototypeOptimizer

_SGD = partial(PrototypeSGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
_ADAMW = partial(PrototypeAdamW, lr=1e-2)
_ADAGRAD = partial(PrototypeAdagrad, lr=0.1)
_Build = Callable[..., Any]
_RULES: dict[str, tuple[_Build, _Build | None]] = {  # ours, and torch's
    "sgd": (_SGD, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)),
    "adamw": (_ADAMW, partial(torch.optim.AdamW, lr=1e-2)),
    "adagrad": (_ADAGRAD, None),
}
_SHAPES = (Shape(200, 3000, 96), Shape(600, 3000, 96), Shape(40, 500, 100))
_OF_SHAPES = ("few samples", "many samples", "uneven rows")
_STEPS = 3


def _head(device: str, shape: Shape, dtype: torch.dtype) -> ArcFaceLoss:
    torch.manual_seed(0)
    return ArcFaceLoss(shape.c, shape.d, dtype=dtype).to(device)


def _batch(device: str, shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(shape.n, shape.d, generator=generator, device=device, dtype=BF16)
    return features.requires_grad_(), torch.randint(shape.c, (shape.n,), generator=generator, device=device)


def _moved(
    device: str, shape: Shape, dtype: torch.dtype, build: _Build, by_slab: bool = False, **options: Any
) -> list[Tensor]:
    """Prototypes and state after some steps; ``by_slab``: PyTorch updates each slab instead of the kernels."""
    head = _head(device, shape, dtype)
    optimizer = build(head if _is_ours(build) else head.parameters(), **options)
    with ExitStack() as stack:
        if by_slab:
            stack.enter_context(mock.patch.object(PrototypeOptimizer, "_in_kernels", return_value=None))
        for step in range(_STEPS):
            optimizer.zero_grad()
            head(*_batch(device, shape, step)).backward()
            optimizer.step()
    state = {name: one for name, one in optimizer.state[head.weight].items() if one.dim()}
    own, exponent = head.weight.detach(), head.weight_exponent
    weight = own if exponent is None else decoded(own, exponent)
    return [weight.double() + state.pop("compensation", 0.0), *state.values()]


def _is_ours(build: Any) -> bool:
    return issubclass(build.func, PrototypeOptimizer)


def _farthest(ours: list[Tensor], others: list[Tensor]) -> float:
    """The largest relative error of prototypes and state, by norm."""
    pairs = zip(ours, others, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


@dataclass(frozen=True)
class UpdateBy:
    """An update in the kernels gives the results of ``torch.optim`` and, in all dtypes, of the update outside of them.

    At one shape: each compiles kernels of its own, one after the other, and several processes share the shapes.
    """

    rule: str
    number: int  # of the shape

    @property
    def __name__(self) -> str:
        return f"update by {self.rule}, {_OF_SHAPES[self.number]}"

    def __call__(self, device: Device) -> str:
        """What is off, and by how much; empty if nothing is."""
        (build, torch_build), shape = _RULES[self.rule], _SHAPES[self.number]
        rounded = {"rounding": "stochastic", "state_dtype": BF16}
        if torch_build is not None:
            error = _farthest(*(_moved(device.kind, shape, FP32, one) for one in (build, torch_build)))
            if not error <= 1e-4:
                return f"off torch.optim by {error:.1e}"
        for dtype, options in ((FP32, {}), (BF16, rounded), (BF16, {"rounding": "kahan"}), (FP8, rounded)):
            runs = (_moved(device.kind, shape, dtype, build, by_slab, **options) for by_slab in (False, True))
            error = _farthest(*runs)
            if not error <= (1e-4 if dtype == FP32 else 2.0**-8):  # about one entry in a thousand rounds differently
                return f"{dtype} {options}: off the slabs by {error:.1e}"
        return ""


def update_waits_for_nothing(device: Device) -> str:
    """No step waits for the device, not even to find out whether its gradients are finite."""
    head = _head(device.kind, _SHAPES[0], BF16)
    optimizer = _ADAMW(head, rounding="stochastic")
    given = [_batch(device.kind, _SHAPES[0], step) for step in range(2)]
    for step, (features, labels) in enumerate(given):
        with waiting_is_an_error() if step else nullcontext():  # the first compiles, which may wait
            head(features, labels).backward()
            optimizer.step()
    return ""


def captured(head: ArcFaceLoss, optimizer: PrototypeOptimizer, features: Tensor, labels: Tensor) -> Callable[[], None]:
    """The replay of a step captured in a CUDA graph, after three steps that are not captured."""

    def step() -> None:
        features.grad = None
        head(features, labels).backward()
        optimizer.step()

    return recorded(step)


def update_in_a_graph(device: Device) -> str:
    """Replays count their steps and read the learning rate anew: they give the same bits as running the steps."""
    shape, found = _SHAPES[0], []
    for in_a_graph in (False, True):
        head, lr = _head(device.kind, shape, BF16), torch.full((), 0.1, device=device.kind)
        optimizer = _ADAMW(head, lr=lr, rounding="stochastic")
        features, labels = _batch(device.kind, shape)
        replay = captured(head, optimizer, features, labels) if in_a_graph else None
        for step in range(2 if in_a_graph else 5):
            if step >= (0 if in_a_graph else 3):
                lr.mul_(0.5)
            if replay is not None:
                replay()
            else:
                head(features, labels).backward()
                optimizer.step()
        found.append([head.weight.detach(), *(one for one in optimizer.state[head.weight].values())])
    return "" if all(map(torch.equal, *found)) else "replays move prototypes to another place"


PROPERTIES = tuple(UpdateBy(rule, number) for number in range(len(_SHAPES)) for rule in _RULES)
ON_A_GPU: tuple[Callable[[Device], str], ...] = (update_waits_for_nothing, update_in_a_graph)


def _whole_step(
    build: _Build, options: dict[str, Any], graph: bool, device: str, shape: Shape, dtype: torch.dtype
) -> Callable[[], None]:
    """A whole step as a function: loss, backward and update of prototypes of ``dtype``."""
    head, (features, labels) = _head(device, shape, dtype), _batch(device, shape)
    optimizer = build(head if _is_ours(build) else head.parameters(), **options)
    if graph:
        return captured(head, optimizer, features, labels)

    def step() -> None:
        head(features, labels).backward()
        optimizer.step()
        optimizer.zero_grad()  # so that gradients count as memory of the next step, not of what was there before
        features.grad = None

    step()  # makes the state, which does not count as memory of the step
    return step


def update_cases(small: bool) -> Iterator[SearchCase]:
    """Whole steps, ours first and with float32 state; memory is what a step takes beside prototypes and state."""
    fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    shapes = (Shape(12, 40, 16),) if small else (Shape(256, 1_000_000, 512), Shape(4096, 131_072, 512))
    for shape in shapes:
        for dtype, rounding in ((FP32, {}), (BF16, {"rounding": "stochastic"}), (FP8, {"rounding": "stochastic"})):
            if dtype == FP8 and not small and torch.cuda.get_device_capability() < (8, 9):
                continue  # the kernels do not take it there
            kind = str(dtype)[6:]
            for graph in (False,) if small else (False, True):
                note = f"{kind} prototypes, PrototypeAdamW{', CUDA graph' * graph}"
                build = partial(_whole_step, _ADAMW, rounding, graph)
                yield SearchCase("whole step", shape, dtype, "ltloss", build, 8, note, allocates=not graph)
            if dtype == FP8:  # which torch.optim does not take
                continue
            state = "float32" if dtype == FP32 else "bfloat16"
            note = f"{kind} prototypes, {state} state"
            build = partial(_whole_step, fused, {}, False)
            yield SearchCase("whole step", shape, dtype, "loss + AdamW(fused)", build, 8, note)
