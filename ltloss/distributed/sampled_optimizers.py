"""Optimizers that touch the prototypes that have a gradient only: their weights, momentum and decay.

A class whose gradient is zero, as that of a class outside of the step's sample is, is left exactly as it is, its state
too. With all classes sampled (or a module that does not sample) both do what torch.optim's optimizer of the same name
does. ``torch.optim`` itself may be used as well: it moves the other classes by momentum and decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltloss._validation import check_number
from ltloss.distributed.layout import Layout, local
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["SampledAdamW", "SampledSGD", "adamw_of_rows", "check_betas"]


class _SampledOptimizer(torch.optim.Optimizer):
    """The step over rows that the two have in common."""

    def __init__(self, module: PrototypeHead, defaults: dict[str, Any]) -> None:
        if not isinstance(module, PrototypeHead):
            raise TypeError(f"module must be a loss module of ltloss; got {type(module).__name__}")
        super().__init__([module.weight], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows whose gradient is not all zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        (weight,) = group["params"]
        if weight.grad is not None:
            grad = local(weight.grad)
            index = grad.flatten(1).any(1).nonzero()[:, 0]
            if index.numel():
                self._update(group, local(weight), index, grad[index], self._state_of(weight))
        return loss

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        for name, columns in self._needs().items():
            if name not in state:
                # Placed as the weight is, so that a checkpoint can be loaded on another number of ranks.
                state[name] = Layout.of(weight).zeros(*(weight.shape[1:] if columns else ()), dtype=weight.dtype)
        return {name: local(tensor) for name, tensor in state.items()}

    def _needs(self) -> dict[str, bool]:
        """The state by name, and whether it has columns as the weight has."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], weight: Tensor, index: Tensor, grad: Tensor, state: Any) -> None:
        raise NotImplementedError


class SampledSGD(_SampledOptimizer):
    """SGD with momentum over the rows with a gradient of a loss module's prototypes.

    Args:
        module: the loss module, after :func:`ltloss.distributed.parallelize`.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.

    Raises:
        TypeError: ``module`` is no loss module.
        ValueError: a setting that is negative or not finite.

    See also: :class:`SampledAdamW`; :class:`ltloss.optim.PrototypeSGD`, which updates inside the backward.

    Example:
        >>> import torch
        >>> from ltloss import CosFaceLoss
        >>> from ltloss.distributed import SampledSGD, parallelize
        >>> loss_fn = parallelize(CosFaceLoss(1000, 8), None, sample_rate=0.1)
        >>> optimizer = SampledSGD(loss_fn, lr=0.1, momentum=0.9)
        >>> loss_fn(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])).backward()
        >>> optimizer.step()
    """

    def __init__(self, module: PrototypeHead, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check_number(name, value, at_least=0.0)
        super().__init__(module, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _needs(self) -> dict[str, bool]:
        return {"momentum_buffer": True} if self.param_groups[0]["momentum"] else {}

    def _update(self, group: dict[str, Any], weight: Tensor, index: Tensor, grad: Tensor, state: Any) -> None:
        step = grad + group["weight_decay"] * weight[index] if group["weight_decay"] else grad
        if group["momentum"]:
            step = group["momentum"] * state["momentum_buffer"][index] + step
            state["momentum_buffer"][index] = step
        weight[index] -= group["lr"] * step


class SampledAdamW(_SampledOptimizer):
    """AdamW over the rows with a gradient. Each class counts its own steps, which its bias correction goes by.

    Args:
        module: the loss module, after :func:`ltloss.distributed.parallelize`.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: ``module`` is no loss module.
        ValueError: a setting that is negative or not finite, betas that are not two numbers in [0, 1).

    See also: :class:`SampledSGD`; :class:`ltloss.optim.PrototypeAdamW`, which updates inside the backward.

    Example:
        >>> from ltloss import CosFaceLoss
        >>> from ltloss.distributed import SampledAdamW, parallelize
        >>> optimizer = SampledAdamW(parallelize(CosFaceLoss(1000, 8), None, sample_rate=0.1), lr=0.01)
    """

    def __init__(
        self,
        module: PrototypeHead,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_number(name, value, at_least=0.0)
        check_betas(betas)
        super().__init__(module, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _needs(self) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": True, "steps": False}

    def _update(self, group: dict[str, Any], weight: Tensor, index: Tensor, grad: Tensor, state: Any) -> None:
        state["steps"][index] += 1
        average, square, steps = (state[name][index] for name in ("exp_avg", "exp_avg_sq", "steps"))
        moved = adamw_of_rows(group, weight[index], grad, average, square, steps)
        weight[index], state["exp_avg"][index], state["exp_avg_sq"][index] = moved


def check_betas(betas: Any) -> None:
    """Raise unless ``betas`` are two numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
    for beta in betas:
        if check_number("betas", beta, at_least=0.0, at_most=1.0) == 1.0:
            raise ValueError(f"betas must be < 1.0, or the means never move; got {betas!r}")


def adamw_of_rows(
    group: dict[str, Any], weight: Tensor, grad: Tensor, average: Tensor, square: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes, average and square (rows, D), or with sub-centres (rows, K, D), after a step of AdamW that is the
    ``steps``-th (rows,) of each row.
    """
    (first, second), lr, steps = group["betas"], group["lr"], steps.view(-1, *[1] * (weight.dim() - 1)).double()
    average = average.lerp(grad, 1 - first)
    square = second * square + (1 - second) * grad * grad
    rate = (lr / (1 - first**steps)).to(grad.dtype)
    root = square.sqrt() / (1 - second**steps).sqrt().to(grad.dtype)
    weight = weight * (1 - lr * group["weight_decay"]) - rate * average / (root + group["eps"])
    return weight, average, square
