"""Losses that use the class counts: a margin per class, or a prior on the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltloss._validation import check_number, check_per_class
from ltloss.class_balance import Counts, checked_counts, log_prior_from_counts, margins_from_counts
from ltloss.losses.margin_losses import CombinedMarginLoss, LossOptions, PriorOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["FromCounts", "LDAMLoss", "LogitAdjustedLoss", "check_class_counts"]


class FromCounts:
    """Mix-in with a constructor for losses that need the number of training samples of each class."""

    @classmethod
    def from_counts(cls, class_counts: Counts, embedding_size: int, **options: Any) -> Self:
        """Build the loss from the class counts, which also determine the number of classes.

        Args:
            class_counts: (C,) training samples per class, all > 0.
            embedding_size: D.
            options: as in the constructor.

        Returns:
            The loss module.

        Raises:
            TypeError, ValueError: counts that are not numbers, not a vector, or not all positive.
        """
        classes = checked_counts(class_counts).numel()
        return cls(classes, embedding_size, class_counts=class_counts, **options)  # type: ignore[call-arg]


def check_class_counts(class_counts: Counts, num_classes: int) -> None:
    """Raise ValueError unless there is one count for each class."""
    classes = checked_counts(class_counts).numel()
    if classes != num_classes:
        raise ValueError(f"class_counts must have one entry per class, {num_classes}; got {classes}")


class LDAMLoss(FromCounts, CombinedMarginLoss):
    """Label-distribution-aware margin: the target logit is s·(cos θ − m_c), m_c = max_margin·(n_c/min n)^(−1/4).

    Args:
        num_classes: C.
        embedding_size: D.
        class_counts: (C,) training samples per class, all > 0.
        max_margin: margin of the rarest class, in units of the cosine.
        options: see :class:`CombinedMarginLoss`. LDAM-DRW also calls :meth:`set_class_weight` with a schedule of
            :class:`ltloss.class_balance.DeferredWeights`.

    Raises:
        ValueError, TypeError: an option of another type or out of range, in the constructor or when it is set.

    See also: :class:`ltloss.LongTailLoss`, with such margins on the angle; :class:`LogitAdjustedLoss`, with a prior
    instead.

    Source: Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019, eq. 13.

    Example:
        >>> from ltloss import LDAMLoss
        >>> LDAMLoss.from_counts([16, 1], embedding_size=8).cosine_margin
        tensor([0.2500, 0.5000])
    """

    _settled = ("max_margin",)

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        class_counts: Counts,
        max_margin: float = 0.5,
        **options: Unpack[PriorOptions],
    ) -> None:
        check_class_counts(class_counts, num_classes)
        margins = margins_from_counts(class_counts, max_margin, normalize="max")
        check_per_class("max_margin", float(max_margin), num_classes, margins, kind="cosine_margin")
        super().__init__(num_classes, embedding_size, cosine_margin=margins, **options)
        self.max_margin = max_margin

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        return {**super().hyper_parameters(), "max_margin": self.max_margin}


class LogitAdjustedLoss(FromCounts, CombinedMarginLoss):
    """Cosine softmax with the log prior added in training: logits s·cos θ_c + τ·log π_c, π_c = n_c/Σn.

    With τ = 1 this is balanced softmax.

    Args:
        num_classes: C.
        embedding_size: D.
        class_counts: (C,) training samples per class, all > 0.
        tau: τ >= 0, the strength of the prior.
        options: see :class:`CombinedMarginLoss`, without ``log_prior``.

    Raises:
        ValueError, TypeError: an option of another type or out of range, in the constructor or when it is set.

    See also: :class:`ltloss.LongTailLoss` with ``tau=1``, with margins as well; :class:`ltloss.LinearSoftmaxLoss` with
    a ``log_prior``, without cosines.

    Sources: Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10; Ren et al., Balanced
    meta-softmax, NeurIPS 2020.

    Example:
        >>> from ltloss import LogitAdjustedLoss
        >>> LogitAdjustedLoss.from_counts([3, 1], embedding_size=8).log_prior.exp()
        tensor([0.7500, 0.2500])
    """

    _settled = ("tau",)

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        class_counts: Counts,
        tau: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        check_class_counts(class_counts, num_classes)
        check_number("tau", tau, at_least=0.0)
        super().__init__(num_classes, embedding_size, log_prior=log_prior_from_counts(class_counts, tau), **options)
        self.tau = tau

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        return {**super().hyper_parameters(), "tau": self.tau}
