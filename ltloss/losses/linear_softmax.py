"""Softmax cross-entropy of a linear layer, without its N×C logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ltloss._types import Reduction
from ltloss._validation import check_type
from ltloss.float8 import FLOAT8
from ltloss.losses.margin_losses import CombinedMarginLoss
from ltloss.reference import products

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearOptions", "LinearSoftmaxLoss"]


class LinearOptions(TypedDict, total=False):
    """What a linear softmax takes besides its bias; see :func:`ltloss.functional.margin_cross_entropy`."""

    log_prior: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    reduction: Reduction
    device: torch.device | str | None
    dtype: torch.dtype | None


class LinearSoftmaxLoss(CombinedMarginLoss):
    """Cross-entropy of a linear layer, logits x·w_c + b_c: the baseline without any cosine, in memory of O(N + C·D).

    Args:
        num_classes: C.
        embedding_size: D.
        bias: False leaves b out.
        options: see :class:`LinearOptions`. With a ``log_prior``, which no prediction sees, it is balanced softmax.

    Attributes:
        weight: (C, D) parameter, and bias: (C,) parameter or None, drawn as ``torch.nn.Linear`` draws them. Under
            :func:`ltloss.distributed.parallelize` every rank holds the whole bias, with the gradient of the global
            batch.

    Raises:
        ValueError, TypeError: an option of another type or out of range, float8 as ``dtype``, later a margin.

    Sources: of the prior Ren et al., Balanced meta-softmax, NeurIPS 2020, eq. 4; Menon et al., Long-tail learning via
    logit adjustment, ICLR 2021, eq. 10.

    Example:
        >>> import torch
        >>> from ltloss import LinearSoftmaxLoss
        >>> loss_fn = LinearSoftmaxLoss(num_classes=1000, embedding_size=64)
        >>> loss_fn(torch.randn(8, 64), torch.randint(1000, (8,))).backward()
        >>> loss_fn.bias.grad.shape
        torch.Size([1000])
        >>> loss_fn.predict(torch.randn(8, 64), k=5).index.shape
        torch.Size([8, 5])
    """

    bias: nn.Parameter | None

    _settled = ("scale", "normalize_features")

    def __init__(
        self, num_classes: int, embedding_size: int, *, bias: bool = True, **options: Unpack[LinearOptions]
    ) -> None:
        check_type("bias", bias, bool)
        if options.get("dtype") == FLOAT8:
            raise TypeError(f"dtype of a linear softmax must keep lengths; got {FLOAT8}, which keeps directions alone")
        super().__init__(num_classes, embedding_size, scale=1.0, normalize_features=False, sub_centers=1, **options)
        self.bias = None
        if bias:  # float32 beside weights in half precision, and never without memory
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.bias = nn.Parameter(torch.empty(num_classes, dtype=wide, device=self._constants_device))
            self._draw(self.bias)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as ``torch.nn.Linear`` does: evenly in ±1/√D."""
        for parameter in self.parameters(recurse=False):  # the weight alone, while it is drawn for the first time
            self._draw(parameter)
        if self.fused_update is not None:
            self.fused_update.replaced()

    def _draw(self, parameter: nn.Parameter) -> None:
        bound = self.embedding_size**-0.5
        nn.init.uniform_(parameter, -bound, bound)

    def logits(self, features: Tensor) -> Tensor:
        """x·w + b without prior, as prediction uses them: (N, D) -> (N, C).

        Dense: for large C use :meth:`predict`.
        """
        return self._dense_logits(features, self.weight)

    def _logit_options(self) -> dict[str, Any]:
        return {"normalize_prototypes": False, "bias": self.bias}

    def _dense_logits(self, features: Tensor, weight: Tensor) -> Tensor:
        logits = products(features, weight)
        return logits if self.bias is None else logits + self.bias

    def hyper_parameters(self) -> dict[str, Any]:
        """Every hyper-parameter by name."""
        names = LinearOptions.__annotations__.keys() - {"device", "dtype"}
        options = {name: value for name, value in super().hyper_parameters().items() if name in names}
        return {"bias": self.bias is not None, **options}
