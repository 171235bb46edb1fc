"""Compare what the GPU computes with float64: every loss of the family, over dtypes, shapes and inputs.

There are two bounds. The allowed error is the project's promise: 1.5 times that of plain PyTorch, which multiplies in
the same dtype, plus the rounding of the result. An error above it is "less accurate than promised". An error above
``WRONG`` times the allowed one, or a NaN, is a mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.loss_gpu.apart import Answer, spread
from benchmarks.loss_gpu.measure import Deadline
from ltloss import functional, reference, use_workspace
from ltloss.testing import FAMILY, Outcome, Problem, outcome, problem

Dtypes = tuple[torch.dtype, torch.dtype]  # of features and prototypes
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
FACTOR, WRONG = 1.5, 8.0
# Allowed to every result: of two equally good float32 implementations either may round more luckily, on three samples
# by some dozen roundings.
FLOOR = 2.0**-18

SHAPES = (
    (1, 1, 1),
    (3, 2, 5),
    (7, 130, 33),
    (129, 257, 72),
    (600, 2000, 512),
    (64, 300, 1000),
    (256, 1000, 512),
    (130, 5000, 96),
    (33, 700, 4096),
    (16, 300, 8192),
    (513, 1500, 128),
    (700, 900, 100),
)
DTYPES: tuple[Dtypes, ...] = (
    (BF16, BF16),
    (FP16, FP16),
    (FP32, FP32),
    (BF16, FP32),
    (FP32, BF16),
    (FP16, BF16),
    (BF16, FP8),  # which has no gradient dW
)
SCALES = (1.0, 64.0, 100.0, 512.0)
USUAL, SMALL = 256 << 20, 1 << 20  # bytes of workspace; with the small one slabs have 1024 classes


class Case(NamedTuple):
    """One comparison; ``given`` is float64 on the CPU, ``options`` are those of ``margin_cross_entropy``."""

    name: str
    given: Problem
    dtypes: Dtypes
    options: dict[str, Any]
    workspace: int = USUAL


class Verdict(NamedTuple):
    """Relative errors (2-norm) of loss, feature gradient and prototype gradient (if any), and the allowed errors."""

    case: str
    errors: tuple[float, ...]
    allowed: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest error as a multiple of the allowed one; infinite for NaN."""
        ratios = [error / bound for error, bound in zip(self.errors, self.allowed, strict=True)]
        return max(ratio if ratio == ratio else float("inf") for ratio in ratios)

    def problem(self) -> str:
        """What is wrong, or less accurate than promised, with the numbers; empty if nothing is."""
        if self.worst <= 1.0:
            return ""
        pairs = zip(("loss", "dX", "dW"), self.errors, self.allowed, strict=False)
        text = ", ".join(f"{name} {error:.1e} (allowed {bound:.1e})" for name, error, bound in pairs)
        return f"{'WRONG' if self.worst > WRONG else 'less accurate than promised'}, {text}"

    def row(self) -> dict[str, str]:
        """The errors as columns of a table."""
        names = ("loss", "features", "prototypes")
        return {name: f"{error:.2e}" for name, error in zip(names, self.errors, strict=False)}


def _inputs(n: int, c: int, d: int) -> dict[str, Problem]:
    """Inputs by name on which an implementation could be less accurate than PyTorch."""
    given = problem(n, c, d)
    own = given.prototypes[given.labels.clamp_min(0)]
    trained = 3.0 * own + 0.15 * given.features
    trained[::6] = 3.0 * given.prototypes[: len(trained[::6])]
    return {
        "trained": given._replace(features=trained),
        "equal to the target prototype": given._replace(features=own.clone()),
        "opposite to the target prototype": given._replace(features=-2.0 * own),
        "duplicate prototypes": given._replace(prototypes=given.prototypes[torch.arange(c) % 10]),
        "one feature": given._replace(features=given.prototypes[:1].expand(n, d).clone()),
        "everything ignored": given._replace(labels=torch.full_like(given.labels, -100)),
        "zero rows": Problem(given.features * (torch.arange(n) % 3 > 0)[:, None], given.prototypes, given.labels),
    }


def cases(quick: bool) -> Iterator[Case]:
    """All cases, the most telling first, in case the time runs out."""
    c, d = 1000, 96
    few, many = 200, 600  # up to 512 samples other kernels run than for more
    sizes = ((BF16, BF16, few), (BF16, BF16, many), (FP16, FP16, many), (FP32, FP32, many), (BF16, FP32, few))
    for x, w, n in sizes[: 2 if quick else None]:  # the last: float32 master weights under bfloat16
        for loss, options in FAMILY.items():
            yield Case(f"{loss}, N = {n}", problem(n, c, d), (x, w), options(c))
    margins = FAMILY["long_tail"]
    for dtypes in DTYPES[: 2 if quick else None]:
        for shape in SHAPES[: 5 if quick else None]:
            for loss in ("long_tail", "everything"):
                yield Case(f"{loss} {shape}", problem(*shape), dtypes, FAMILY[loss](shape[1]))
    yield from _several_slabs(quick)
    for dtypes in DTYPES[: 1 if quick else 3]:
        for kind, given in _inputs(150, 600, 64).items():
            yield Case(f"long_tail on {kind}", given, dtypes, margins(600))
        for scale in SCALES:
            yield Case(f"scale {scale:g}", problem(150, 600, 64), dtypes, {**margins(600), "scale": scale})
            kept: dict[str, Any] = {"normalize_features": False, "scale": scale / 8, "angular_margin": 0.3}
            yield Case(f"length kept, scale {scale / 8:g}", problem(150, 600, 64), dtypes, kept)
    empty = problem(2, 600, 64)
    yield Case("empty batch", Problem(empty.features[:0], empty.prototypes, empty.labels[:0]), (BF16, BF16), {})


def _several_slabs(quick: bool) -> Iterator[Case]:
    """Cases with more classes than a slab of the backward, in all pairs of dtypes; one sample; many classes."""
    for dtypes in DTYPES[: 2 if quick else None]:
        for n in (130,) if quick else (130, 1, 600):
            for loss in ("long_tail",) if quick else ("long_tail", "everything"):
                options = FAMILY[loss](5000)
                yield Case(f"{loss}, slabs of 1024 classes, N = {n}", problem(n, 5000, 96), dtypes, options, SMALL)
    for dtypes in () if quick else (DTYPES[0], DTYPES[1], DTYPES[3]):
        yield Case("long_tail, C = 70000", problem(64, 70_000, 64), dtypes, FAMILY["long_tail"](70_000), SMALL)


def product_dtype(dtypes: Dtypes) -> torch.dtype:
    """The dtype of the product: the features' half precision if the prototypes allow it, else float32."""
    features, prototypes = dtypes
    return features if features != FP32 and prototypes in (features, FP32, FP8) else FP32


def plain_pytorch(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The reference with its matrix product and the unit vectors of the product in ``dtype``."""

    def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
        unit = reference.direction(features.to(dtype)), reference.direction(prototypes.to(dtype))
        return (unit[0] @ unit[1].t()).float()

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        with mock.patch.object(reference, "cosines", cosines):
            return reference.margin_cross_entropy(*tensors, **options)

    return loss


def _distance(one: Tensor, other: Tensor) -> float:
    size = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / (size or 1.0)


def compare(case: Case, device: str) -> Verdict:
    """Compare ours and plain PyTorch with float64, on the same numbers, already rounded to the case's dtypes."""
    features, prototypes, labels = (tensor.to(device) for tensor in case.given)
    given = Problem(features.to(case.dtypes[0]), prototypes.to(case.dtypes[1]), labels)
    options = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in case.options.items()}
    per_sample = options.get("reduction") == "none"
    upstream = torch.linspace(-1.0, 2.0, 2 * len(labels), device=device)[::2] if per_sample else None
    exact_upstream = None if upstream is None else upstream.double()
    wide = Problem(given.features.double(), given.prototypes.double(), labels)
    exact = outcome(wide, exact_upstream, loss=reference.margin_cross_entropy, **options)
    readable = given._replace(prototypes=given.prototypes.float()) if case.dtypes[1] == FP8 else given
    plain = outcome(readable, upstream, loss=plain_pytorch(product_dtype(case.dtypes)), **options)
    with use_workspace(case.workspace):
        found = _ours(given, upstream, options)
    rounding = [max(FLOOR, unit) for unit in (0.0, *(torch.finfo(dtype).eps for dtype in case.dtypes))]
    plain_errors = _distances(plain[: len(found)], exact)
    allowed = [FACTOR * error + floor for error, floor in zip(plain_errors, rounding, strict=False)]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
    return Verdict(f"{case.name} ({names})", tuple(_distances(found, exact)), tuple(allowed))


def _ours(given: Problem, upstream: Tensor | None, options: dict[str, Any]) -> Sequence[Tensor]:
    """Loss, dX and, unless the prototypes are float8, dW."""
    if given.prototypes.dtype != FP8:
        return outcome(given, upstream, loss=functional.margin_cross_entropy, **options)
    features = given.features.clone().requires_grad_()
    loss = functional.margin_cross_entropy(features, given.prototypes, given.labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, features, torch.ones_like(loss) if upstream is None else upstream)


def _distances(found: Sequence[Tensor], exact: Outcome) -> list[float]:
    return [_distance(one, other) for one, other in zip(found, exact, strict=False)]


@dataclass
class Summary:
    """Counts of one run, and descriptions of what is wrong or inaccurate."""

    compared: int = 0
    left_out: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)
    inaccurate: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Add the verdict of one comparison."""
        self.worst = max(self.worst, verdict.worst)
        if problem := verdict.problem():
            (self.wrong if verdict.worst > WRONG else self.inaccurate).append(f"{verdict.case}: {problem}")


@functools.cache
def _all_cases(quick: bool) -> list[Case]:
    return list(cases(quick))


def check_case(number: int, device: str, quick: bool) -> Verdict:
    """Run the comparison of case number ``number``."""
    return compare(_all_cases(quick)[number], device)


def check_all(
    device: str,
    deadline: Deadline,
    quick: bool = False,
    processes: int = 0,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[str, Answer], None] = lambda name, answer: None,
) -> Summary:
    """Run every case that the time allows; ``tell`` is called with the answer of each at once.

    They run in ``processes`` processes with the variables ``environment``, because nearly all of the time goes to
    compiling. A case that ends its process, or hangs, costs only itself.
    """
    names = [f"{case.name} {tuple(str(one).removeprefix('torch.') for one in case.dtypes)}" for case in cases(quick)]
    summary = Summary(left_out=len(names))
    work = functools.partial(check_case, device=device, quick=quick)
    for number, answer in spread(work, range(len(names)), device, deadline, processes, environment):
        tell(names[number], answer)
        if answer.late:
            continue
        summary.compared += 1
        summary.left_out -= 1
        if answer.problem:
            summary.wrong.append(f"{names[number]}: {answer.problem}")
        else:
            summary.add(answer.value)
    return summary
