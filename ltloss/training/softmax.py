"""Plain softmax cross-entropy with a linear layer: the baseline without any cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ltloss.types import TopK


class SoftmaxLoss(nn.Module):
    """Cross-entropy of logits = x·wᵀ + b, with the methods of the cosine losses.

    Args:
        num_classes: C.
        embedding_size: D.

    """

    scale = 1.0

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_size, num_classes)

    @property
    def weight(self) -> Tensor:
        """The class weights (C, D), a parameter."""
        return self.linear.weight

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D)."""
        logits: Tensor = self.linear(features.to(self.weight.dtype))
        return logits

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of features (N, D) and labels (N,)."""
        return F.cross_entropy(self.logits(features), labels)

    def predict(self, features: Tensor, k: int = 1) -> TopK:
        """The k classes of largest logit (N, k), with the cosine of the feature to each class weight."""
        index = self.logits(features).topk(k, dim=1).indices
        directions = F.normalize(self.weight[index].float(), dim=-1)
        cosine = (directions * F.normalize(features.float(), dim=-1).unsqueeze(1)).sum(-1)
        return TopK(cosine, index)
