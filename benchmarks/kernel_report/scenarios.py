"""Steps and searches that together launch every kernel in every form that users can launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ltloss.margins import Margin, Objective

__all__ = ["FLOAT8_FROM", "RULES", "loss_step", "prototype_update", "scenarios"]

# Several tiles of each, and no multiples of a tile or of 16, so that Triton specialises for no accidental divisor.
_SAMPLES, _CLASSES = 600, 2200
_FEW_SAMPLES = (300, 60)  # prototypes are read once; with 60, in tiles of 64 rows
_UNEVEN, _NARROW, _WIDTH, _WIDEST = 100, 128, 512, 8192
_BYTES = 256 << 20  # of workspace
FLOAT8 = torch.float8_e4m3fn
FLOAT8_FROM = 89  # the least compute capability for which Triton compiles a kernel that reads it


def loss_step(
    features: torch.Tensor,
    prototypes: torch.Tensor,
    margin: Margin,
    *,
    between: Callable[[], None] = lambda: None,
    update: Any = None,
    keep: bool = False,
    learns: bool = False,
    bent: bool = False,
    several: bool = False,
    limit: int = _BYTES,
    **options: Any,
) -> None:
    """Forward and backward of a margin loss by the entry points of the kernels; ``between`` is called between them.

    ``update``: a ``PrototypeUpdate`` in place of the gradient of the prototypes. ``keep``: keep the exponentials for
    the backward. ``learns``: the prior has a gradient. ``bent``: logits of other classes above a threshold are changed
    by a polynomial. ``several``: two labels per sample. ``limit``: bytes of workspace. ``options``: of ``Objective``.
    """
    import ltloss_kernels as kernels

    labels = torch.arange(len(features))
    if several:
        labels = torch.stack([labels, labels.flip(0)], 1)
    objective = Objective(margin, **{"scale": 64.0, **options})
    given, smooth = (features, prototypes, labels, objective.log_prior), objective.label_smoothing > 0.0
    bend = [torch.zeros(size, device=features.device) if bent else None for size in (len(features), 3)]
    kept = kernels.new_exponentials(features, prototypes) if keep else None
    partials = kernels.partials(*given, objective.scale, *objective.normalize, smooth, -100, *bend, kept)
    first, own = (partials, labels)
    if several:
        first = partials._replace(target_cosine=partials.target_cosine[:, 0].contiguous())
        own = labels[:, 0].contiguous()
    loss, coefficients, *rest = kernels.margin_loss(first, own, objective, len(prototypes))
    coefficients = torch.cat([coefficients, coefficients[2:3]]) if several else coefficients
    between()
    kernels.gradients(
        torch.ones_like(loss),
        *given,
        coefficients,
        partials.class_scale,
        *rest,
        objective.scale,
        smooth,
        *objective.normalize,
        -100,
        *bend,
        (True, update is None and prototypes.dtype != FLOAT8, learns),
        update=update,
        kept=kept,
        limit=lambda: limit,
    )


# The settings of each rule, and how many states it has. The state of Adagrad is one number per class.
RULES: dict[str, tuple[tuple[float, ...], int]] = {
    "sgd": ((0.9, 0.0, 1e-4), 1),
    "nesterov": ((0.9, 0.0, 1e-4), 1),
    "adamw": ((0.1, 0.001, 1e-8, 0.01), 2),
    "adagrad": ((1e-10, 0.0), 1),
}


def prototype_update(
    rule: str,
    prototypes: torch.Tensor,
    state: torch.dtype = torch.float32,
    rounding: str = "stochastic",
    seed: int = 0,
    **rest: Any,
) -> Any:
    """A ``PrototypeUpdate`` of these prototypes, with uninitialised state."""
    import ltloss_kernels as kernels

    settings, states = RULES[rule]
    shape = prototypes.shape[: 1 if rule == "adagrad" else 2]
    device, half = prototypes.device, torch.bfloat16
    return kernels.PrototypeUpdate(
        rule=rule,  # type: ignore[arg-type]
        settings=settings,
        lr=torch.full((), 0.01, device=device),
        weight=prototypes,
        state=tuple(torch.empty(shape, dtype=state, device=device) for _ in range(states)),
        compensation=torch.empty(prototypes.shape, dtype=half, device=device) if rounding == "kahan" else None,
        exponent=torch.zeros(len(prototypes), dtype=torch.int8, device=device) if prototypes.dtype == FLOAT8 else None,
        rounding=rounding,  # type: ignore[arg-type]
        seed=seed,
        first_class=0,
        finite=torch.ones((), dtype=torch.bool, device=device),
        step=torch.zeros((), device=device),
        skipped=torch.zeros((), dtype=torch.int64, device=device),
        **rest,
    )


def _updates(arch: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Fused updates: few and many samples, prototypes of half and single precision and float8, wide and uneven rows."""
    half, single = torch.bfloat16, torch.float32
    some = ("sgd", "adamw")
    yield from _rules(f"bf16, N = {_FEW_SAMPLES[0]}", *_matrices(_FEW_SAMPLES[0], _WIDTH, half, half))
    yield from _rules("bf16", *_matrices(_SAMPLES, _WIDTH, half, half))
    yield from _rules("bf16 x fp32", *_matrices(_SAMPLES, _WIDTH, half, single))
    yield from _rules(f"fp32, N = {_FEW_SAMPLES[0]}", *_matrices(_FEW_SAMPLES[0], _WIDTH, single, single), some)
    for width in (_UNEVEN, _WIDEST):
        yield from _rules(f"bf16, D = {width}", *_matrices(_SAMPLES, width, half, half), some)
    if arch >= FLOAT8_FROM:
        yield from _rules("bf16 x fp8", *_matrices(_SAMPLES, _WIDTH, half, FLOAT8))
        for width in (_UNEVEN, _WIDEST):
            yield from _rules(f"bf16 x fp8, D = {width}", *_matrices(_SAMPLES, width, half, FLOAT8), some)


def _rules(
    label: str, features: torch.Tensor, prototypes: torch.Tensor, chosen: tuple[str, ...] = ()
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each rule with float32 state, and the options that take most registers: rounded state, clipping, loss scale."""
    half, loss_scale = prototypes.dtype == torch.bfloat16, torch.ones(())
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "sgd": ("sgd", {}),
        "adamw": ("adamw", {}),
        "adagrad": ("adagrad", {}),
        "nesterov, bf16 state": ("nesterov", {"state": torch.bfloat16}),
        "adamw, bf16 state": ("adamw", {"state": torch.bfloat16}),
        "adamw, clipped": ("adamw", {"max_class_norm": 1.0, "loss_scale": loss_scale}),
        **({"adamw, kahan": ("adamw", {"rounding": "kahan"})} if half else {}),
        **({"sgd, nearest": ("sgd", {"rounding": "nearest"})} if prototypes.dtype == FLOAT8 else {}),
    }
    for name in chosen or variants:
        rule, options = variants[name]
        update = prototype_update(rule, prototypes, **options)
        yield f"{label}, {name}", lambda update=update: loss_step(features, prototypes, Margin(0.5), update=update)  # type: ignore[misc]


def _searches(features: torch.Tensor, prototypes: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    import ltloss_kernels as kernels

    rows = torch.arange(0, len(prototypes), 3)
    near, some = torch.arange(len(prototypes)), torch.arange(len(rows))
    yield "all", lambda: kernels.nearest_prototype(prototypes, None, True)
    yield "rows", lambda: kernels.nearest_prototype(prototypes, rows, True)
    yield "top 5", lambda: kernels.top_k(features, prototypes, 5, limit=lambda: _BYTES)
    if prototypes.dtype == FLOAT8:  # has no gradient
        return
    gradient = kernels.nearest_prototype_gradient
    yield "all", lambda: gradient(torch.ones(len(near)), prototypes, None, near)
    yield "rows", lambda: gradient(torch.ones(len(rows)), prototypes, rows, some)


def _losses(features: torch.Tensor, prototypes: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    vector = torch.linspace(0.1, 0.5, len(prototypes))
    everything = Margin(vector, vector, 1.1)
    weighted = {"log_prior": vector, "class_weight": vector, "label_smoothing": 0.1}
    variants: dict[str, tuple[Margin, dict[str, Any]]] = {
        "fixed": (Margin(0.5), {}),
        "online": (Margin(0.5), {"scale": 512.0}),
        "prior": (Margin(0.5), {"log_prior": vector}),
        "fixed, smoothing": (Margin(0.5), {"label_smoothing": 0.1}),
        "everything": (everything, weighted),
        "everything, arcface": (everything._replace(beyond_pi="arcface"), weighted),
        "length kept": (Margin(0.5), {"normalize_features": False}),
        "linear": (Margin(), {"normalize_features": False, "normalize_prototypes": False, "scale": 1.0}),
        "bent": (Margin(0.5), {"log_prior": vector, "bent": True}),
        "two labels": (Margin(0.5), {**weighted, "learns": True, "several": True}),
        "everything, learning prior": (everything, {**weighted, "learns": True}),
    }
    for name, (margin, options) in variants.items():
        yield name, lambda margin=margin, options=options: loss_step(features, prototypes, margin, **options)  # type: ignore[misc]


def _kept() -> Iterator[tuple[str, Callable[[], None]]]:
    """Kept exponentials: with a fixed shift, and with a running maximum and the options that take most registers."""
    from ltloss_kernels.config.precision import float32_products

    half, single = torch.bfloat16, torch.float32
    largest = {"log_prior": torch.linspace(0.1, 0.5, _CLASSES), "label_smoothing": 0.1}
    for samples in (_SAMPLES, *_FEW_SAMPLES):
        size = f", N = {samples}" * (samples != _SAMPLES)
        step = partial(loss_step, *_matrices(samples, _WIDTH, half, half), Margin(0.5), keep=True)
        yield f"bf16, fixed, kept{size}", step
        yield f"bf16, everything, kept{size}", partial(step, **largest)
    step = partial(loss_step, *_matrices(_SAMPLES, _NARROW, half, half), Margin(0.5), keep=True)
    yield f"bf16, fixed, kept, D = {_NARROW}", step
    for label, dtype, precision in (
        ("fp16", torch.float16, "highest"),
        ("fp32", single, "highest"),
        ("tf32", single, "high"),
    ):
        with float32_products(precision):
            step = partial(loss_step, *_matrices(_SAMPLES, _WIDTH, dtype, dtype), Margin(0.5), keep=True)
            yield f"{label}, everything, kept", partial(step, **largest)


def _sub_centers() -> Iterator[tuple[str, Callable[[], None]]]:
    """Sub-centres, with the options that take most registers."""
    from ltloss_kernels.config.precision import float32_products

    largest = {"log_prior": torch.linspace(0.1, 0.5, _CLASSES), "label_smoothing": 0.1, "learns": True}
    half, single = torch.bfloat16, torch.float32
    for label, dtype, precision, centers in (
        ("bf16", half, "highest", 3),
        ("bf16", half, "highest", 8),
        ("fp16", torch.float16, "highest", 3),
        ("fp32", single, "highest", 3),
        ("tf32", single, "high", 3),
    ):
        with float32_products(precision):
            features = torch.ones(_SAMPLES, _WIDTH, dtype=dtype)
            several = torch.ones(_CLASSES, centers, _WIDTH, dtype=dtype)
            yield f"{label}, everything, K = {centers}", partial(loss_step, features, several, Margin(0.5), **largest)
            if centers == 3:
                yield f"{label}, bent, K = 3", partial(loss_step, features, several, Margin(0.5), bent=True)


def _matrices(samples: int, width: int, left: torch.dtype, right: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(samples, width, dtype=left), torch.ones(_CLASSES, width, dtype=right)


def _products(arch: int) -> list[tuple[str, torch.dtype, torch.dtype, str, tuple[str, ...] | None]]:
    """(label, dtype of features, dtype of prototypes, precision of float32 products, names of losses and searches).

    The names are None for all.
    """
    half, single = torch.bfloat16, torch.float32
    losses = ("fixed", "online", "bent", "two labels", "everything", "everything, learning prior")
    some = (*losses, "all", "top 5")
    return [
        ("bf16", half, half, "highest", None),
        ("bf16 x fp32", half, single, "highest", ("fixed",)),
        ("fp16", torch.float16, torch.float16, "highest", losses),
        ("fp32", single, single, "highest", some),
        ("tf32", single, single, "high", some),
        *([("bf16 x fp8", half, FLOAT8, "highest", ("fixed", "all", "top 5"))] if arch >= FLOAT8_FROM else []),
    ]


def scenarios(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every scenario for a compute capability, by name; run each before taking the next one."""
    from ltloss_kernels.config.precision import float32_products

    half, products = torch.bfloat16, _products(arch)
    for label, left, right, precision, chosen in products:
        features, prototypes = _matrices(_SAMPLES, _WIDTH, left, right)
        with float32_products(precision):
            for variant, launch in itertools.chain(_losses(features, prototypes), _searches(features, prototypes)):
                if chosen is None or variant in chosen:
                    yield f"{label}, {variant}", launch
    # Few samples: the usual case, and the largest of each product.
    for samples, (label, left, right, precision, _) in itertools.product(_FEW_SAMPLES, products):
        usual = ("fixed",) * (left == right == half)
        with float32_products(precision):
            for variant, launch in _losses(*_matrices(samples, _WIDTH, left, right)):
                if variant in ("everything", "everything, learning prior", *usual):
                    yield f"{label}, {variant}, N = {samples}", launch
    for variant, launch in _losses(*_matrices(_SAMPLES, _NARROW, half, half)):
        if variant in ("fixed", "everything"):
            yield f"bf16, {variant}, D = {_NARROW}", launch
    yield f"bf16, D = {_UNEVEN}", partial(loss_step, *_matrices(_SAMPLES, _UNEVEN, half, half), Margin(0.5))
    widest = _matrices(_SAMPLES, _WIDEST, half, half)
    yield f"bf16, D = {_WIDEST}", partial(loss_step, *widest, Margin(0.5))
    for _, launch in _searches(*widest):
        yield f"bf16, D = {_WIDEST}", launch
    yield from itertools.chain(_kept(), _sub_centers(), _updates(arch))
