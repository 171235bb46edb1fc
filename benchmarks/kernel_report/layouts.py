"""Steps over many layouts of their inputs, each of which may need other launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ltloss
from ltloss import functional
from ltloss.optim import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD

__all__ = ["steps"]


def _matrix(rows: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "offset":  # rows that start at no multiple of 16 bytes
        return torch.ones(rows * width + 1, dtype=dtype)[1:].view(rows, width)
    if layout == "strided":
        return torch.ones(rows, 2 * width, dtype=dtype)[:, ::2]
    return torch.ones(rows, width, dtype=dtype)


def _labels(n: int, dtype: torch.dtype, layout: str) -> Tensor:
    return {"": torch.zeros(n, dtype=dtype), "strided": torch.zeros(2 * n, dtype=dtype)[::2]}[layout]


def steps() -> Iterator[Callable[[], None]]:
    """Steps that each differ in one thing for which Triton specialises a kernel, or on which the launchers decide."""
    half, single = torch.bfloat16, torch.float32
    usual: dict[str, Any] = {"n": 40, "c": 300, "d": 64, "x": (half, ""), "w": (half, ""), "y": (torch.int64, "")}
    changes: list[dict[str, Any]] = [{}, *({size: value} for size in "ncd" for value in (1, 16, 17, 48, 129))]
    changes += [{"x": (dtype, kind)} for dtype in (half, single, torch.float16) for kind in ("", "offset", "strided")]
    changes += [{"w": (dtype, kind)} for dtype in (half, single, torch.float16) for kind in ("", "offset", "strided")]
    changes += [{"x": (kind, ""), "w": (kind, "")} for kind in (single, torch.float16)]
    changes += [{"y": (dtype, kind)} for dtype in (torch.int32, torch.int64) for kind in ("", "strided")]
    vector = torch.linspace(0.1, 0.5, 300)
    options: list[dict[str, Any]] = [
        {"ignore_index": 1},
        {"ignore_index": 16},
        {"scale": 512.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"normalize_features": False},
        {"angular_margin": 0.3},
        {"angular_margin": vector},
        {"cosine_margin": torch.linspace(0, 1, 301)[1:]},
        {"log_prior": vector},
        {"log_prior": vector, "label_smoothing": 0.1},
        {"class_weight": vector},
        {"angular_margin": 0.3, "beyond_pi": "arcface"},
        {"angular_margin": 0.3, "margin_gradient": "straight_through"},
    ]
    for change in changes:
        yield lambda given={**usual, **change}: _step(**given)  # type: ignore[misc]
    for chosen in options:
        yield lambda chosen=chosen: _step(**usual, options=chosen)  # type: ignore[misc]
    for needs in ((True, False), (False, True)):
        yield lambda needs=needs: _step(**usual, needs=needs)  # type: ignore[misc]
    yield lambda: _step(**usual, options={"reduction": "none"}, upstream=torch.ones(80)[::2])
    for scale in (64.0, 512.0):  # exponentials relative to a fixed shift, and to running maxima
        yield lambda scale=scale: _keeping(_step, **usual, options={"scale": scale})  # type: ignore[misc]
    for dtype in (half, single):
        for take in (None, lambda *_: None):
            yield lambda dtype=dtype, take=take: _gradients(dtype, take)  # type: ignore[misc]
    yield from _updates()


def _keeping(step: Callable[..., None], **given: Any) -> None:
    with ltloss.use_workspace(1 << 30, keep_exponentials=True):
        step(**given)


def _gradients(dtype: torch.dtype, take: Callable[[int, int, Tensor], None] | None) -> None:
    """A backward that returns the gradient of the prototypes, in their dtype, or gives it to ``take``, in float32."""
    from ltloss_kernels import gradients

    one, matrices = torch.ones(()), (_matrix(40, 64, dtype, ""), _matrix(300, 64, dtype, ""))
    saved = _labels(40, torch.int64, ""), None, torch.ones(4, 40), torch.ones(300), one, one
    options: tuple[Any, ...] = (64.0, False, True, True, -100, None, None)
    gradients(one, *matrices, *saved, *options, (True, True, False), take, limit=lambda: 1 << 30)


def _updates() -> Iterator[Callable[[], None]]:
    """Steps with a fused update, which each differ in one thing."""
    half: dict[str, Any] = {"rounding": "stochastic"}
    rate = torch.full((), 0.1)
    changes: list[dict[str, Any]] = [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"max_class_norm": 1.0},
        {"seed": 1 << 40},
        {"seed": 1},
        {"lr": rate},
        {"rounding": "kahan"},
        {"rounding": "nearest"},
        {"momentum": 0.9, "state_dtype": torch.bfloat16},
    ]
    for change in changes:
        yield lambda change=change: _moving(PrototypeSGD, torch.bfloat16, {**half, **change})  # type: ignore[misc]
    for kind in (PrototypeSGD, PrototypeAdamW, PrototypeAdagrad):
        for dtype, options in ((torch.bfloat16, half), (torch.float32, {})):
            for sizes in ((40, 300, 64), (600, 300, 64), (40, 17, 20), (40, 300, 19)):
                yield lambda args=(kind, dtype, options, *sizes): _moving(*args)  # type: ignore[misc]


def _moving(
    kind: Callable[..., Any], dtype: torch.dtype, options: dict[str, Any], n: int = 40, c: int = 300, d: int = 64
) -> None:
    head = ltloss.ArcFaceLoss(c, d).to(dtype)
    optimizer = kind(head, **options)
    head(_matrix(n, d, torch.bfloat16, "").requires_grad_(), _labels(n, torch.int64, "")).backward()
    optimizer.step()


def _step(
    n: int,
    c: int,
    d: int,
    x: tuple[torch.dtype, str],
    w: tuple[torch.dtype, str],
    y: tuple[torch.dtype, str],
    options: dict[str, Any] | None = None,
    needs: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
) -> None:
    features, prototypes = _matrix(n, d, *x).requires_grad_(needs[0]), _matrix(c, d, *w).requires_grad_(needs[1])
    loss = functional.margin_cross_entropy(features, prototypes, _labels(n, *y), **(options or {}))
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
