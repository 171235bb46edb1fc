"""Networks over standardised embeddings, as ``--head`` names them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ltloss._estimator.space import WIDEST


def build_head(name: str, width: int, embedding_size: int) -> nn.Module:
    """The network ``name`` from embeddings (N, width) to features (N, embedding_size): linear or mlp.

    ``linear`` learns nothing beside the prototypes, so the classifier is linear (or a cosine classifier). ``mlp`` has
    one hidden layer of ``width`` units with batch normalisation and ReLU.
    """
    if name == "linear":
        return Whitening(width)
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(width, width, bias=False),
            norm=nn.BatchNorm1d(width),
            relu=nn.ReLU(inplace=True),
            embedding=nn.Linear(width, embedding_size),
        )
    )


class Whitening(nn.Module):
    """x -> x·matrix, where the matrix makes the covariance within the classes the identity.

    The matrix (D, D), or its diagonal (D,) for more than 4096 features, is computed once at the start of a training. It
    is part of the checkpoint.
    """

    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(width) if width <= WIDEST else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) of standardised embeddings (N, D), in float32 under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return x * self.matrix if self.matrix.dim() == 1 else x @ self.matrix
