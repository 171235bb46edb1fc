"""Softmax cross-entropy with a linear layer: the baseline without cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ltloss._types import TopK
from ltloss.class_balance import log_prior_from_counts
from ltloss.functional import margin_cross_entropy, top_k

if TYPE_CHECKING:
    from collections.abc import Sequence


# With so many classes or more the N×C logits are not stored; with fewer the dense loss is faster.
_MANY = 4096


class SoftmaxLoss(nn.Module):
    """Cross-entropy of the logits x·wᵀ + b, with the methods of the cosine losses.

    Args:
        num_classes: C.
        embedding_size: D.
        class_counts: (C,) training samples per class, which a prior needs.
        tau: τ·log π_c is added to the logits in training: balanced softmax for τ = 1.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Sources of the prior: Ren et al., Balanced meta-softmax, NeurIPS 2020, eq. 4; Menon et al., Long-tail learning via
    logit adjustment, ICLR 2021, eq. 10.
    """

    scale = 1.0
    log_prior: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        class_counts: Sequence[int] | None = None,
        tau: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if tau and class_counts is None:
            raise ValueError("class_counts must be given where tau is not 0; got None")
        self.linear = nn.Linear(embedding_size, num_classes)
        self.label_smoothing = label_smoothing
        prior = log_prior_from_counts(class_counts, tau) if tau and class_counts is not None else None
        self.register_buffer("log_prior", prior, persistent=False)
        self.register_buffer("class_weight", None, persistent=False)

    @classmethod
    def from_counts(cls, class_counts: Sequence[int], embedding_size: int, **options: Any) -> SoftmaxLoss:
        """The loss for the classes counted in ``class_counts`` (C,)."""
        return cls(len(class_counts), embedding_size, class_counts=class_counts, **options)

    @property
    def weight(self) -> Tensor:
        """The class weights (C, D), a parameter."""
        return self.linear.weight

    def set_class_weight(self, class_weight: Tensor | None) -> None:
        """Replace the factors (C,) on the loss of each class, or remove them with None."""
        self.class_weight = None if class_weight is None else class_weight.to(self.weight.device)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D), without a prior."""
        logits: Tensor = self.linear(features.to(self.weight.dtype))
        return logits

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of features (N, D) and labels (N,), weighted by class where weights were set."""
        # With label smoothing, PyTorch weights each class's part by its own weight, ours all by that of the label.
        alike = self.class_weight is None or self.label_smoothing == 0.0
        if alike and len(self.weight) >= _MANY:
            return margin_cross_entropy(
                features.to(self.weight.dtype),
                self.weight,
                labels,
                scale=1.0,
                normalize_features=False,
                normalize_prototypes=False,
                bias=self.linear.bias,
                log_prior=self.log_prior,
                class_weight=self.class_weight,
                label_smoothing=self.label_smoothing,
            )
        logits = self.logits(features)
        if self.log_prior is not None:
            logits = logits + self.log_prior
        return F.cross_entropy(logits, labels, weight=self.class_weight, label_smoothing=self.label_smoothing)

    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """The k classes of largest logit (N, k), with the cosine of the feature to each class weight."""
        if len(self.weight) >= _MANY:
            features = features.to(self.weight.dtype)
            return top_k(features, self.weight.detach(), k, normalize_prototypes=False, bias=self.linear.bias.detach())
        index = self.logits(features).topk(k, dim=1).indices
        directions = F.normalize(self.weight[index].float(), dim=-1)
        cosine = (directions * F.normalize(features.float(), dim=-1).unsqueeze(1)).sum(-1)
        return TopK(cosine, index)
