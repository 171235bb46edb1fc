"""Properties checked beside accuracy: repeatable bits, no waiting for the device, CUDA graphs, very large tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.loss_gpu import search, updates
from benchmarks.loss_gpu.apart import spread
from benchmarks.loss_gpu.measure import Deadline, Device, waiting_is_an_error
from benchmarks.peers import Inputs, Shape, run_step
from ltloss import ArcFaceLoss, functional, use_backend, use_workspace

Options = dict[str, Any]


def _step(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients of the margin loss."""

    def loss() -> Tensor:
        return functional.margin_cross_entropy(
            inputs.features, inputs.prototypes, inputs.labels, angular_margin=inputs.margins, **options
        )

    value = run_step(loss, inputs)
    if inputs.features.grad is None or inputs.prototypes.grad is None:
        raise RuntimeError("a gradient is missing")
    return value, inputs.features.grad, inputs.prototypes.grad


def _draw(device: Device, n: int, c: int, d: int, seed: int = 0) -> Inputs:
    return Inputs.draw(Shape(n, c, d), seed, device=device.kind, dtype=torch.bfloat16)


def _differ(one: tuple[Tensor, ...], other: tuple[Tensor, ...], tolerance: float) -> str:
    """Which of loss and gradients differ by more than ``tolerance``, relative by norm; empty if none does."""
    texts = []
    for name, a, b in zip(("loss", "dX", "dW"), one, other, strict=True):
        distance = float((a.double() - b.double()).norm() / b.double().norm())
        if not distance <= tolerance:
            texts.append(f"{name} differs by {distance:.1e}")
    return ", ".join(texts)


def repeatable(device: Device) -> str:
    """Two runs give the same bits."""
    inputs = _draw(device, 300, 5000, 96)
    return _differ(_step(inputs), _step(inputs), 0.0)


def outside_label(device: Device) -> str:
    """A label outside the classes gives a NaN loss on a GPU (an error on a CPU), and leaves other samples unchanged."""
    inputs = _draw(device, 8, 100, 32)
    inputs.labels[3] = 100
    try:
        losses = functional.margin_cross_entropy(inputs.features, inputs.prototypes, inputs.labels, reduction="none")
    except IndexError:
        return "" if not device.is_cuda else "IndexError without ltloss.debug_labels"
    return "" if torch.isnan(losses).nonzero().flatten().tolist() == [3] else f"losses {losses.tolist()}"


def not_contiguous(device: Device) -> str:
    """Strided inputs give what their contiguous copies give, to the last rounding of the gradients."""
    wide = _draw(device, 60, 400, 200)
    view = Inputs(wide.features.detach()[:, 3:-1:2], wide.prototypes.detach()[:, 3:-1:2], wide.labels, wide.margins)
    copy = Inputs(view.features.contiguous(), view.prototypes.contiguous(), wide.labels, wide.margins)
    for inputs in (view, copy):
        inputs.features.requires_grad_()
        inputs.prototypes.requires_grad_()
    return _differ(_step(view), _step(copy), 2.0**-8)


def _searches(inputs: Inputs) -> tuple[Tensor, ...]:
    """The minimum angle over all rows and over some, its gradient, and the top-5 classes."""
    rows = torch.arange(0, inputs.prototypes.shape[0], 3, device=inputs.prototypes.device)
    values = [functional.min_angle_regularizer(inputs.prototypes, classes=chosen) for chosen in (None, rows)]
    gradient = torch.autograd.grad(values[0] + values[1], inputs.prototypes)[0]
    return (
        *(value.detach() for value in values),
        gradient,
        functional.top_k(inputs.features, inputs.prototypes, 5).index,
    )


def no_waiting(device: Device) -> str:
    """Nothing in a step waits for the device."""
    inputs = _draw(device, 64, 500, 64)
    _step(inputs)  # compiles, which may wait
    _searches(inputs)
    with waiting_is_an_error():
        _step(inputs)
        _searches(inputs)
    return ""


def cuda_graph(device: Device) -> str:
    """A captured step, replayed on other inputs, gives the results of running it."""
    return _replayed(device, 500)


def cuda_graph_of_slabs(device: Device) -> str:
    """The same of a step whose backward has several slabs."""
    with use_workspace(1 << 20):
        return _replayed(device, 5000)


def _replayed(device: Device, classes: int) -> str:
    inputs, others = (_draw(device, 64, classes, 64, seed) for seed in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(inputs)
            _searches(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    inputs.drop_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(inputs)
        found = _searches(inputs)
    with torch.no_grad():
        for name in ("features", "prototypes", "labels", "margins"):
            getattr(inputs, name).copy_(getattr(others, name))
    graph.replay()
    if not all(torch.equal(one, other) for one, other in zip(found, _searches(others), strict=True)):
        return "a captured search finds something else"
    return _differ(captured, _step(others), 0.0)


def compiled(device: Device) -> str:
    """torch.compile compiles a module without a graph break, and the loss is the same."""
    torch.manual_seed(0)
    head = ArcFaceLoss(500, 64).to(device.kind)
    inputs = _draw(device, 64, 500, 64)
    eager = head(inputs.features, inputs.labels)
    fast = torch.compile(head, fullgraph=True)(inputs.features, inputs.labels)
    fast.backward()
    return "" if float((fast - eager).abs()) <= 1e-6 * float(eager) else f"{float(fast)} instead of {float(eager)}"


def _against_chunked(device: Device, inputs: Inputs) -> str:
    found = tuple(tensor.clone() for tensor in _step(inputs))
    with use_backend("torch"):
        expected = _step(inputs)
    keep = slice(-2000, None)  # the far end of the prototypes, which 32-bit offsets would miss
    return _differ((*found[:2], found[2][keep]), (*expected[:2], expected[2][keep]), 1e-2)


def prototypes_beyond_32_bits(device: Device) -> str:
    """C·D > 2^31: the last prototypes are read and get their gradient."""
    inputs = _draw(device, 64, (1 << 31) // 512 + 4096, 512)
    inputs.labels.copy_(inputs.prototypes.shape[0] - 1 - 7 * torch.arange(64, device=device.kind))
    return _against_chunked(device, inputs)


def logits_beyond_32_bits(device: Device) -> str:
    """N·C > 2^31: the last row blocks and class tiles are right."""
    inputs = _draw(device, 16_384, 140_000, 32)
    inputs.labels[-64:] = inputs.prototypes.shape[0] - 1 - torch.arange(64, device=device.kind)
    return _against_chunked(device, inputs)


Property = Callable[[Device], str]  # what is wrong, or ""

ANYWHERE: tuple[Property, ...] = (repeatable, outside_label, not_contiguous, *search.PROPERTIES, *updates.PROPERTIES)
ON_A_GPU: tuple[Property, ...] = (
    no_waiting,
    cuda_graph,
    cuda_graph_of_slabs,
    prototypes_beyond_32_bits,
    logits_beyond_32_bits,
    compiled,
    *updates.ON_A_GPU,
)


class Summary(NamedTuple):
    """How many properties were checked and left out, and for those that do not hold what is wrong, by name."""

    compared: int
    left_out: int
    wrong: dict[str, str]


def properties(device: Device, quick: bool) -> list[Property]:
    """The properties to check on this device: first those that no other machine can tell."""
    return [*(ON_A_GPU[: 2 if quick else None] if device.is_cuda else ()), *ANYWHERE]


def _check(device: Device, holds: Property) -> str:
    return holds(device)


def check_all(
    device: Device,
    deadline: Deadline,
    todo: Sequence[Property],
    processes: int,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Summary:
    """Check the properties until the deadline, in ``processes`` processes; ``tell`` is told at once what is wrong.

    0 processes: in this one, which a broken device then breaks.
    """
    wrong: dict[str, str] = {}
    compared = 0
    work = functools.partial(_check, device)
    for holds, answer in spread(work, todo, device.kind, deadline, processes):
        name, problem = holds.__name__.replace("_", " "), answer.problem or answer.value
        compared += not answer.late
        if problem:
            tell(f"{'left out' if answer.late else 'WRONG'}: {name}: {problem}")
        if problem and not answer.late:
            wrong[name] = problem
    return Summary(compared, len(todo) - compared, wrong)
