"""The prototypes of a pytorch-metric-learning loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ltloss.distributed.layout import Layout
from ltloss.interop._fill import fill
from ltloss.losses.prototype_head import PrototypeHead

__all__ = ["import_pytorch_metric_learning"]


def import_pytorch_metric_learning(head: PrototypeHead, loss: nn.Module | Mapping[str, Tensor] | Tensor) -> None:
    """Fill a head with the ``W`` of a pytorch-metric-learning loss, which stands transposed, (D, C).

    Args:
        head: sharded or not.
        loss: the loss, its state_dict, or ``W`` itself; the same on all ranks.

    Raises:
        ValueError: no ``W`` there, or of another shape.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.interop import import_pytorch_metric_learning
        >>> import_pytorch_metric_learning(ArcFaceLoss(10, 4), {"W": torch.randn(4, 10)})
    """
    given = loss.state_dict() if isinstance(loss, nn.Module) else loss
    matrix = given.get("W") if isinstance(given, Mapping) else given
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        raise ValueError(
            "loss must be or hold a tensor W (D, C), as pytorch-metric-learning's classification losses do"
        )
    width, classes = matrix.shape
    start, stop = Layout.of(head.weight).span()
    fill(head, (classes, width), "W of pytorch-metric-learning", matrix.t()[start:stop])
