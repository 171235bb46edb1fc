"""The cosine-space loss, source B of ``docs/mathematics.md``."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ltloss._deprecation import renamed_fields
from ltloss._validation import check_choice, check_number, check_supervised, check_type
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.losses.class_centers import CenterUpdate, ClassCenters, check_not_inside_ddp, check_update
from ltloss.losses.prototype_head import FRACTION, NOT_NEGATIVE, Checks, Names, PrototypeHead
from ltloss.ops.logsumexp import Shard

__all__ = ["CosineSpaceLoss"]

_OPTIONS = (
    "scale",
    "margin",
    "inter_weight",
    "intra_weight",
    "ce_weight",
    "epsilon",
    "start_step",
    "truncate",
    "label_smoothing",
    "ignore_index",
    "strict",
)


def _check_start_step(name: str, given: Any) -> None:
    check_type(name, given, int)
    check_number(name, given, at_least=0)


@renamed_fields(parts="terms")
class CosineSpaceLoss(PrototypeHead):
    """Source B: first spread the classes, then compact each. L = α·L_inter + β(t)·Trunc(L_intra − ε) + γ·L_CE.

    * L_inter: AM-Softmax with ``margin``, target logit s·(cos θ − m).
    * L_CE: cross-entropy of the same logits without the margin. Both come from one pass over the prototypes.
    * L_intra: the mean of 1 − cos(x_i, c_{y_i}), with a running centre c per class.
    * Trunc(v) = max(v, 0). β(t) is 0 for the first ``start_step`` batches, then β.

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s; None: :func:`ltloss.default_scale` of C.
        margin: m in [-2, 2], the cosine margin of L_inter, a number or (C,).
        inter_weight: α.
        intra_weight: β.
        ce_weight: γ. The published order is γ > α > β.
        epsilon: ε >= 0, the value of 1 − cos that is compact enough.
        start_step: the number of batches without L_intra.
        truncate: truncate the mean of the ``"batch"``, or the term of each ``"sample"`` before the mean.
        center_update, center_momentum: ``update`` and ``momentum`` of :class:`ltloss.ClassCenters`.
        strict: False accepts weights in another order than γ > α > β.
        label_smoothing, ignore_index: for L_inter and L_CE, as in :class:`ltloss.CombinedMarginLoss`.
        device, dtype: device and dtype of the weight, as in :class:`PrototypeHead`.

    Attributes:
        terms: the terms of the last call, ``{"inter": L_inter, "intra": L_intra, "cross_entropy": L_CE}``, unweighted,
            untruncated and detached.
        centers: the :class:`ltloss.ClassCenters`. They are updated in ``train()`` mode only, and are in the state_dict.
        step: the number of batches seen in ``train()`` mode, a 0-d buffer in the state_dict.

    Raises:
        ValueError, TypeError: an option of another type or out of range; weights that are not γ > α > β, unless
            ``strict=False``.
        RuntimeError: a call in ``train()`` mode inside DistributedDataParallel, which would keep only the centres of
            rank 0.

    See also: :class:`ltloss.CosFaceLoss`, which is L_inter alone; :class:`ltloss.ClassCenters`.

    Source: source B of ``docs/mathematics.md``.

    Example:
        >>> import torch
        >>> from ltloss import CosineSpaceLoss
        >>> loss_fn = CosineSpaceLoss(10, 16, start_step=100)
        >>> loss = loss_fn(torch.randn(4, 16), torch.tensor([0, 0, 1, 2]))
        >>> int(loss_fn.step), sorted(loss_fn.terms)
        (1, ['cross_entropy', 'inter', 'intra'])
    """

    step: Tensor
    margin: Tensor | float

    _per_class = ("margin",)
    _kinds: ClassVar[Names] = {"margin": "cosine_margin"}
    _ordered = ("ce_weight", "inter_weight", "intra_weight", "strict")
    _checks: ClassVar[Checks] = {
        **dict.fromkeys(("inter_weight", "intra_weight", "ce_weight", "epsilon"), NOT_NEGATIVE),
        "start_step": _check_start_step,
        "truncate": partial(check_choice, known=("batch", "sample")),
        "strict": partial(check_type, expected=bool),
        "label_smoothing": FRACTION,
        "ignore_index": partial(check_type, expected=int),
    }

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float | None = None,
        margin: Tensor | float = 0.35,
        inter_weight: float = 0.5,
        intra_weight: float = 0.25,
        ce_weight: float = 1.0,
        epsilon: float = 0.1,
        start_step: int = 0,
        truncate: Literal["batch", "sample"] = "batch",
        center_update: CenterUpdate = "mean",
        center_momentum: float = 0.9,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        strict: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, device=device, dtype=dtype)
        self.margin = margin
        check_update(center_update, center_momentum, "center_")
        self.epsilon, self.start_step, self.truncate = epsilon, start_step, truncate
        self.inter_weight, self.intra_weight, self.ce_weight = inter_weight, intra_weight, ce_weight
        self.strict = strict  # after the weights, because from here on setting one checks their order
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.centers = ClassCenters(
            num_classes, embedding_size, update=center_update, momentum=center_momentum, device=device
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.terms: dict[str, Tensor] = {}

    def _check(self, name: str, value: Any) -> None:
        super()._check(name, value)
        if name in self._ordered and (name == "strict" or "strict" in self.__dict__):
            ce, inter, intra, strict = ({**self.__dict__, name: value}[each] for each in self._ordered)
            if strict and not ce > inter > intra:
                raise ValueError(
                    "the weights must satisfy ce_weight > inter_weight > intra_weight (γ > α > β) unless strict=False; "
                    f"got ce_weight={ce:g}, inter_weight={inter:g}, intra_weight={intra:g}"
                )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new prototypes and reset the centres and the step."""
        super().reset_parameters()
        if "step" in self._buffers:  # not yet in the first call, by the constructor of the base class
            self.centers.reset_parameters()
            self.step.zero_()

    def forward(self, features: Tensor, labels: Tensor, *, shard: Shard | None = None) -> Tensor:
        """Compute the loss of a batch. In ``train()`` mode, update the centres and the step.

        Args:
            features: (N, D).
            labels: (N,).
            shard: the classes that were drawn; :func:`ltloss.distributed.parallelize` passes it.

        Returns:
            A scalar.

        Raises:
            RuntimeError: in ``train()`` mode inside DistributedDataParallel.
        """
        if self.training:
            check_not_inside_ddp()
        check_supervised(features, self.weight, labels)
        inter, cross_entropy = self._cross_entropies(features, labels, shard)
        labels = labels.to(torch.int64)
        labels = labels.masked_fill(labels == self.ignore_index, -1)
        features = features.masked_fill((labels < 0)[:, None], 0.0)  # ignored rows may hold NaN
        intra_weight = torch.where(self.step >= self.start_step, self.intra_weight, 0.0)
        if self.training:
            self.centers.update(features.detach(), labels)
            self.step += 1
        intra, truncated = self._intra(features, labels)
        self.terms = {"inter": inter.detach(), "intra": intra.detach(), "cross_entropy": cross_entropy.detach()}
        return self.inter_weight * inter + intra_weight * truncated + self.ce_weight * cross_entropy

    def _cross_entropies(self, features: Tensor, labels: Tensor, shard: Shard | None) -> tuple[Tensor, Tensor]:
        """L_inter and L_CE."""
        stats = logsumexp_stats(
            features,
            self.weight,
            labels,
            scale=self.scale,
            ignore_index=self.ignore_index,
            with_logit_sum=self.label_smoothing > 0.0,
            shard=shard,
            update=self.fused_update,
        )
        inter, plain = (
            reduce_losses(
                margin_losses(stats, cosine_margin=margin, label_smoothing=self.label_smoothing), stats.labels
            )
            for margin in (self.margin, 0.0)
        )
        return inter, plain

    def _intra(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """L_intra, and Trunc(L_intra − ε)."""
        distance = 1.0 - self.centers.cosine(features, labels)
        intra = reduce_losses(distance, labels)
        if self.truncate == "batch":
            return intra, (intra - self.epsilon).clamp_min(0.0)
        return intra, reduce_losses((distance - self.epsilon).clamp_min(0.0), labels)

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        centers = {"center_update": self.centers.update_rule, "center_momentum": self.centers.momentum}
        return {name: getattr(self, name) for name in _OPTIONS} | centers
