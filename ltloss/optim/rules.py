"""The three optimizers of prototypes: SGD with momentum, AdamW, and Adagrad with one number a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltloss._validation import check_number, check_type
from ltloss.distributed.sampled_optimizers import adamw_of_rows, check_betas
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.optim.prototype_optimizer import PrototypeOptimizer, UpdateOptions
from ltloss.optim.slabs import Moving

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PrototypeAdagrad", "PrototypeAdamW", "PrototypeSGD"]


class PrototypeSGD(PrototypeOptimizer):
    """SGD of a loss module's prototypes, slab by slab inside the backward: the gradient (C, D) never exists.

    v ← μ·v + (1 − dampening)·(g + λ·w), w ← w − η·v, as ``torch.optim.SGD`` on the stored gradient (v starts as the
    first g + λ·w). With Nesterov's momentum w ← w − η·(g + λ·w + μ·v). The prototypes move in ``backward``;
    ``step()`` closes the step, and learning-rate schedulers, ``state_dict`` and ``load_state_dict`` work as ever.
    In a sampled head only the drawn classes move.

    Args:
        module: the loss module, after :func:`ltloss.distributed.parallelize` if that is used.
        lr: η, in units of prototype length over gradient.
        momentum: μ. Its buffer is allocated here: a scheduler that sets μ later needs a momentum > 0 from the start.
        dampening, weight_decay, nesterov: λ is the weight decay; as in ``torch.optim.SGD``.
        state_dtype: dtype of the state, ``torch.float32`` or ``torch.bfloat16`` (rounded stochastically, or to nearest
            with ``rounding="nearest"``). None: float32.
        rounding: how bfloat16 or float8 prototypes are rounded; required for them. ``"stochastic"``: the mean of many
            writes is the float32 value. ``"kahan"`` (bfloat16 only): the rounding error is kept, 2 bytes per entry.
            ``"nearest"``: every update below half a unit in the last place is lost.
        seed: seed of the stochastic rounding; it is in the ``state_dict``.
        max_class_norm: clip the gradient of each class (D,) to this norm; None: no clipping. Clipping by the norm over
            all classes would need the whole gradient first.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss; its scale is divided out.

    Attributes:
        skipped_steps: how many backwards left everything untouched because a gradient was NaN or infinite.

    Raises:
        TypeError, ValueError: settings of another type or out of range, a module whose dtype needs ``rounding``.
        ValueError: from the forward pass: a momentum that was 0 at first.
        RuntimeError: from ``backward``, before anything moved: a second backward before ``step()`` (accumulation), two
            losses in one backward, another term with a gradient for the prototypes (see ``joined(loss)``). From
            ``step()``: no backward came.

    See also: :class:`PrototypeAdamW`; :class:`PrototypeAdagrad`, with the least state;
    :class:`ltloss.distributed.SampledSGD`, which takes a stored gradient.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.optim import PrototypeSGD
        >>> loss_fn = ArcFaceLoss(num_classes=1000, embedding_size=16)
        >>> optimizer = PrototypeSGD(loss_fn, lr=0.1, momentum=0.9)
        >>> before = loss_fn.weight.detach().clone()
        >>> loss_fn(torch.randn(8, 16), torch.arange(8)).backward()
        >>> optimizer.step()
        >>> bool((loss_fn.weight != before).any()), loss_fn.weight.grad
        (True, None)
    """

    def __init__(
        self,
        module: PrototypeHead,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[UpdateOptions],
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, value in numbers.items():
            check_number(name, value, at_least=0.0)
        check_number("dampening", dampening, at_least=0.0, at_most=1.0)
        check_type("nesterov", nesterov, bool)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening = 0; got {momentum} and {dampening}")
        defaults = {**numbers, "dampening": dampening, "nesterov": nesterov}
        super().__init__(module, defaults, **options)

    def _needs(self) -> dict[str, bool]:
        return {"momentum_buffer": True} if self.defaults["momentum"] else {}

    def reads(self, prototypes: Tensor) -> Tensor:
        """As the base class; refuses a momentum that was set later, as ``OneCycleLR`` sets it, and has no buffer."""
        momentum = self.param_groups[0]["momentum"]
        if momentum and not self.defaults["momentum"]:
            raise ValueError(
                f"momentum was 0 when PrototypeSGD was made, so there is no buffer for it; got {momentum} in "
                "param_groups. Make it with a momentum > 0, or the scheduler with cycle_momentum=False"
            )
        return super().reads(prototypes)

    def _moving(self) -> Moving:
        moving = super()._moving()  # as in torch the buffer rests while μ is 0
        return moving if self.param_groups[0]["momentum"] else moving._replace(state={})

    def rule(self) -> tuple[str, tuple[float, ...]]:
        """For the kernels."""
        (group,) = self.param_groups
        settings = group["momentum"], group["dampening"], group["weight_decay"]
        return "nesterov" if group["nesterov"] else "sgd", settings

    def move(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor) -> None:
        """Update prototypes (rows, D) and their state in place by one step of SGD."""
        (group,) = self.param_groups
        buffer = state.get("momentum_buffer")
        torch._fused_sgd_(
            [weight],
            [gradient],
            [] if buffer is None else [buffer],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=bool(step == 1),
        )


class PrototypeAdamW(PrototypeOptimizer):
    """AdamW of a loss module's prototypes, slab by slab inside the backward: the gradient (C, D) never exists.

    m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², w ← (1 − η·λ)·w − η·m̂/(√v̂ + ε) with m̂ = m/(1 − β1^t) and
    v̂ = v/(1 − β2^t), as ``torch.optim.AdamW`` on the stored gradient. In a sampled head only the drawn classes move,
    and t counts the draws of each class. How it is used: :class:`PrototypeSGD`.

    Args:
        module: the loss module, after :func:`ltloss.distributed.parallelize` if that is used.
        lr: η.
        betas: β1 and β2.
        eps: ε.
        weight_decay: λ.
        options: see :class:`PrototypeSGD`.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`PrototypeSGD`.

    See also: :class:`PrototypeSGD`; :class:`PrototypeAdagrad`, with the least state.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019, algorithm 2.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.optim import PrototypeAdamW
        >>> optimizer = PrototypeAdamW(ArcFaceLoss(1000, 16), lr=1e-3)
        >>> sorted(optimizer.state_dict()["state"][0])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        module: PrototypeHead,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[UpdateOptions],
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        for name, value in numbers.items():
            check_number(name, value, at_least=0.0)
        check_betas(betas)
        self._sampled = getattr(module, "sampler", None) is not None
        defaults = {**numbers, "betas": betas}
        super().__init__(module, defaults, **options)

    def _needs(self) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": True, **({"draws": False} if self._sampled else {})}

    def rule(self) -> tuple[str, tuple[float, ...]]:
        """For the kernels."""
        (group,) = self.param_groups
        first, second = group["betas"]
        return "adamw", (1.0 - first, 1.0 - second, group["eps"], group["weight_decay"])

    def move(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor) -> None:
        """Update prototypes (rows, D) and their state in place by one step of AdamW."""
        (group,) = self.param_groups
        kept = weight, state["exp_avg"], state["exp_avg_sq"]
        if self._sampled:
            draws = state["draws"].add_(1.0)
            for tensor, moved in zip(kept, adamw_of_rows(group, kept[0], gradient, *kept[1:], draws), strict=True):
                tensor.copy_(moved)
            return
        torch._fused_adamw_(
            [weight],
            [gradient],
            [kept[1]],
            [kept[2]],
            [],
            [step],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class PrototypeAdagrad(PrototypeOptimizer):
    """Row-wise Adagrad of a loss module's prototypes inside the backward: four bytes of state per class.

    With g ← g + λ·w: a_c ← a_c + ‖g_c‖²/D, w_c ← w_c − η·g_c/(√a_c + ε). How it is used: :class:`PrototypeSGD`.

    Args:
        module: the loss module, after :func:`ltloss.distributed.parallelize` if that is used.
        lr: η.
        eps: ε.
        weight_decay: λ.
        initial_accumulator_value: a_c before the first step; the state a is (C,).
        options: see :class:`PrototypeSGD`.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`PrototypeSGD`.

    See also: :class:`PrototypeSGD`; :class:`PrototypeAdamW`.

    Sources: Duchi et al., Adaptive subgradient methods, JMLR 2011; the row-wise form: Gupta et al., Training
    recommender systems at scale, KDD 2021.

    Example:
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.optim import PrototypeAdagrad
        >>> optimizer = PrototypeAdagrad(ArcFaceLoss(1000, 16), lr=0.1)
        >>> optimizer.state_dict()["state"][0]["sum"].shape
        torch.Size([1000])
    """

    def __init__(
        self,
        module: PrototypeHead,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        **options: Unpack[UpdateOptions],
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        for name, value in {**numbers, "initial_accumulator_value": initial_accumulator_value}.items():
            check_number(name, value, at_least=0.0)
        self._initial = initial_accumulator_value
        super().__init__(module, numbers, **options)

    def _needs(self) -> dict[str, bool]:
        return {"sum": False}

    def rule(self) -> tuple[str, tuple[float, ...]]:
        """For the kernels."""
        (group,) = self.param_groups
        return "adagrad", (group["eps"], group["weight_decay"])

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        state = super()._fresh_state(weight)
        state["sum"].fill_(self._initial)
        return state

    def move(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor) -> None:
        """Update prototypes (rows, D) and their state in place by one step of Adagrad."""
        (group,) = self.param_groups
        if group["weight_decay"]:
            gradient.add_(weight, alpha=group["weight_decay"])
        total = state["sum"].add_(torch.linalg.vecdot(gradient, gradient), alpha=1.0 / gradient.shape[1])
        weight.addcmul_(gradient, (total.sqrt() + group["eps"]).reciprocal_()[:, None], value=-float(group["lr"]))
