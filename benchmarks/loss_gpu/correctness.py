"""Compare what the GPU computes with float64: every loss of the family, over dtypes, shapes and inputs.

There are two bounds. The allowed error is the project's promise: 1.5 times that of plain PyTorch, which multiplies in
the same dtype, plus the rounding of the result. An error above it is "less accurate than promised". An error above
``WRONG`` times the allowed one, or a NaN, is a mistake.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from ltloss_kernels.config.precision import float32_products
from torch import Tensor

from benchmarks.loss_gpu.apart import Answer, spread
from benchmarks.loss_gpu.measure import Deadline
from ltloss import functional, reference, soft_labels, use_backend, use_workspace
from ltloss._types import Reduction
from ltloss.extend import Bend, logsumexp_stats, margin_losses, reduce_losses
from ltloss.testing import FAMILY, Problem, problem

Dtypes = tuple[torch.dtype, torch.dtype]  # of features and prototypes
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
FACTOR, WRONG = 1.5, 8.0
# Allowed to every result: of two equally good float32 implementations either may round more luckily, on three samples
# by some dozen roundings.
FLOOR = 2.0**-18
KEPT = 2.0**-8  # the rounding of kept exponentials

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
    """One comparison; ``given`` is float64 on the CPU, ``options`` are those of the loss, one of ``_losses``."""

    name: str
    given: Problem
    dtypes: Dtypes
    options: dict[str, Any]  # whose vectors may ask for a gradient
    workspace: int = USUAL
    loss: str = "margin"
    kept: bool = False  # the exponentials
    products: str = "highest"  # of float32


class Verdict(NamedTuple):
    """Relative errors (2-norm) of loss and gradients (``names``), and the allowed errors."""

    case: str
    errors: tuple[float, ...]
    allowed: tuple[float, ...]
    names: tuple[str, ...] = ("loss", "features", "prototypes")

    @property
    def worst(self) -> float:
        """The largest error as a multiple of the allowed one; infinite for NaN."""
        ratios = [error / bound for error, bound in zip(self.errors, self.allowed, strict=True)]
        return max(ratio if ratio == ratio else float("inf") for ratio in ratios)

    def problem(self) -> str:
        """What is wrong, or less accurate than promised, with the numbers; empty if nothing is."""
        if self.worst <= 1.0:
            return ""
        each = zip(self.names, self.errors, self.allowed, strict=True)
        text = ", ".join(f"{name} {error:.1e} (allowed {bound:.1e})" for name, error, bound in each)
        return f"{'WRONG' if self.worst > WRONG else 'less accurate than promised'}, {text}"

    def row(self) -> dict[str, str]:
        """The errors as columns of a table."""
        return {name: f"{error:.2e}" for name, error in zip(self.names, self.errors, strict=True)}


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
    yield from _extensions(quick)
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


def _extensions(quick: bool) -> Iterator[Case]:
    """What the family does not have: sub-centres, several labels, vectors that learn, bends, lengths, TF32, keeping."""
    c, d = 1000, 96
    margin: dict[str, Any] = {"angular_margin": 0.3, "scale": 20.0}
    lengths: dict[str, Any] = {"normalize_prototypes": False, "scale": 2.0}
    prior = torch.linspace(-3.0, 0.0, c, dtype=torch.float64).requires_grad_()
    for n in (200,) if quick else (200, 600):
        given, of = problem(n, c, d), f", N = {n}"
        several = given._replace(labels=torch.stack([given.labels, given.labels.roll(2), given.labels.roll(5)], 1))
        weight = torch.linspace(0.1, 0.9, 3 * n, dtype=torch.float64).view(n, 3)
        for dtypes in DTYPES[: 1 if quick or n == 600 else 4]:
            yield Case(f"three sub-centres{of}", _with_sub_centers(given, c), dtypes, margin)
            yield Case(f"learned prior{of}", given, dtypes, {**margin, "log_prior": prior})
            yield Case(f"learned bias, lengths of prototypes{of}", given, dtypes, {**lengths, "bias": prior})
            yield Case(f"three labels{of}", several, dtypes, {**margin, "label_weight": weight}, loss="soft labels")
            yield Case(f"curricular{of}", given, dtypes, {}, loss="curricular")
            yield Case(f"filtered{of}", given, dtypes, {}, loss="filtered")
            for kind, options in (("fixed shift", margin), ("prior", {**margin, "log_prior": prior.detach()})):
                yield Case(f"kept, {kind}{of}", given, dtypes, options, kept=True)
        for kind in ("trained", "zero rows"):
            options = {**margin, "scale": 64.0}
            yield Case(f"TF32 on {kind}{of}", _inputs(n, c, d)[kind], (FP32, FP32), options, products="high")
    slabs = problem(130, 5000, d)
    for kind, scale in (("fixed shift", 20.0), ("running maximum", 300.0)):
        options = {**margin, "scale": scale}
        yield Case(f"kept, {kind}, several slabs", slabs, DTYPES[0], options, 2 * SMALL, kept=True)


def _with_sub_centers(given: Problem, classes: int) -> Problem:
    """Three sub-centres a class, of which one is near to its samples: which is nearest must not be a matter of luck."""
    n, d = given.features.shape
    centers = problem(n, 3 * classes, d).prototypes.view(classes, 3, d)
    own = centers[given.labels.clamp_min(0), torch.arange(n) % 3]
    return given._replace(features=given.features + 2.0 * own, prototypes=centers)


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


def _bent(bend: Callable[[Tensor, Tensor], Bend], *given: Tensor, reduction: Reduction = "mean") -> Tensor:
    stats = logsumexp_stats(*given, scale=30.0, bend=bend)
    return reduce_losses(margin_losses(stats, angular_margin=0.5), stats.labels, reduction=reduction)


def _curricular(cosine: Tensor, labels: Tensor) -> Bend:
    return Bend((cosine.clamp(-1.0, 1.0).acos() + 0.5).cos(), p1=0.3, p2=1.0)


def _filtered(cosine: Tensor, labels: Tensor) -> Bend:
    return Bend(torch.full_like(cosine, 0.15), p0=-math.inf)


Loss = Callable[..., Tensor]


def _losses(name: str) -> tuple[Loss, Loss]:
    """Our loss and its dense twin."""
    if name == "margin":
        return functional.margin_cross_entropy, reference.margin_cross_entropy
    if name == "soft labels":
        return soft_labels.soft_label_cross_entropy, reference.soft_label_cross_entropy
    ours = functools.partial(_bent, {"curricular": _curricular, "filtered": _filtered}[name])

    def dense(*given: Tensor, **options: Any) -> Tensor:
        with use_backend("reference"):
            return ours(*given, **options)

    return ours, dense


def plain_pytorch(loss: Loss, dtype: torch.dtype) -> Loss:
    """A dense loss with its matrix product and the unit vectors of the product in ``dtype``."""

    def products(features: Tensor, prototypes: Tensor) -> Tensor:
        return (features.to(dtype) @ prototypes.to(dtype).t()).float()

    def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
        unit = (reference.direction(one.to(dtype).flatten(0, -2)) for one in (features, prototypes))
        return products(*unit).view(len(features), len(prototypes), math.prod(prototypes.shape[1:-1])).amax(2)

    def plain(*tensors: Tensor, **options: Any) -> Tensor:
        with mock.patch.multiple(reference, cosines=cosines, products=products):
            return loss(*tensors, **options)

    return plain


def _distance(one: Tensor, other: Tensor) -> float:
    size = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / (size or 1.0)


def compare(case: Case, device: str) -> Verdict:
    """Compare ours and plain PyTorch with float64, on the same numbers, already rounded to the case's dtypes."""
    features, prototypes, labels = (tensor.to(device) for tensor in case.given)
    given = Problem(features.to(case.dtypes[0]), prototypes.to(case.dtypes[1]), labels)
    options = {key: v.detach().to(device) if isinstance(v, Tensor) else v for key, v in case.options.items()}
    learned = [key for key, v in case.options.items() if isinstance(v, Tensor) and v.requires_grad]
    ours, dense = _losses(case.loss)
    plain = plain_pytorch(dense, product_dtype(case.dtypes))
    wide = given._replace(features=given.features.double(), prototypes=given.prototypes.double())
    exact = _outcome(dense, wide, options, learned)
    readable = given._replace(prototypes=given.prototypes.float()) if case.dtypes[1] == FP8 else given
    with float32_products(case.products):
        plain_found = _outcome(plain, readable, options, learned)
        with use_workspace(case.workspace, keep_exponentials=case.kept):
            found = _outcome(ours, given, options, learned)
        luck = _luck(plain, dense, readable, options)
    epsilons = dict(zip(("features", "prototypes"), (torch.finfo(dtype).eps for dtype in case.dtypes), strict=True))
    errors, allowed = {}, []
    for name, one in found.items():
        errors[name], plain_error = _distance(one, exact[name]), _distance(plain_found[name], exact[name])
        if name == "loss":
            allowed.append(FACTOR * max(plain_error, luck) + FLOOR)
        else:
            allowed.append(FACTOR * plain_error + max(FLOOR, KEPT * case.kept, epsilons.get(name, 0.0)))
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes)
    return Verdict(f"{case.name} ({dtypes})", tuple(errors.values()), tuple(allowed), tuple(errors))


@torch.no_grad()
def _luck(plain: Loss, dense: Loss, given: Problem, options: Mapping[str, Any]) -> float:
    """How large the relative error of plain PyTorch's mean loss may be: its errors of the samples may cancel by luck.

    Twice the standard deviation of their sum, as if they were independent.
    """
    wide = given._replace(features=given.features.double(), prototypes=given.prototypes.double())
    each, exact = (loss(*one, **{**options, "reduction": "none"}) for loss, one in ((plain, given), (dense, wide)))
    return 2.0 * float((each.double() - exact).norm()) / (float(exact.sum().abs()) or 1.0)


def _outcome(loss: Loss, given: Problem, options: Mapping[str, Any], learned: Sequence[str]) -> dict[str, Tensor]:
    """The loss, and the gradients of features, prototypes (but float8) and the options that are ``learned``, by name.

    Losses per sample get an upstream gradient that varies in size and sign.
    """
    leaves = {"features": given.features, "prototypes": given.prototypes, **{name: options[name] for name in learned}}
    leaves = {name: one.clone() if one.dtype == FP8 else one.clone().requires_grad_() for name, one in leaves.items()}
    own = {**options, **{name: leaves[name] for name in learned}}
    value = loss(leaves["features"], leaves["prototypes"], given.labels, **own)
    upstream = torch.ones_like(value)
    if value.dim():
        upstream = torch.linspace(-1.0, 2.0, 2 * len(value), device=value.device, dtype=value.dtype)[::2]
    wanted = {name: one for name, one in leaves.items() if one.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()), upstream)
    return {"loss": value.detach(), **dict(zip(wanted, grads, strict=True))}


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
