"""Softmax cross-entropy of a linear layer, without the N×C logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ltloss._types import Reduction
from ltloss._validation import check_pair, check_type
from ltloss.float8 import FLOAT8
from ltloss.losses.margin_losses import CombinedMarginLoss
from ltloss.reference import products

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearOptions", "LinearSoftmaxLoss"]


class LinearOptions(TypedDict, total=False):
    """Options of a linear softmax besides its bias; see :func:`ltloss.functional.margin_cross_entropy`."""

    log_prior: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    reduction: Reduction
    device: torch.device | str | None
    dtype: torch.dtype | None


class LinearSoftmaxLoss(CombinedMarginLoss):
    """Cross-entropy of a linear layer with logits x·w_c + b_c, in O(N + C·D) memory: the baseline without cosines.

    Args:
        num_classes: C.
        embedding_size: D.
        bias: False leaves b out.
        options: ``log_prior``, ``class_weight``, ``label_smoothing``, ``ignore_index``, ``reduction``, ``device`` and
            ``dtype``, as in :class:`CombinedMarginLoss`. A ``log_prior`` makes it balanced softmax; predictions do not
            use it.

    Attributes:
        weight: parameter (C, D), drawn as ``torch.nn.Linear`` does.
        bias: parameter (C,), drawn likewise, or None. Under :func:`ltloss.distributed.parallelize` every rank holds
            the whole bias, with the gradient of the global batch.

    Raises:
        ValueError, TypeError: an option of another type or out of range, float8 as ``dtype``, a margin set later.

    See also: :class:`ltloss.CosineSoftmaxLoss`, the baseline with cosines;
    ``torch.nn.functional.linear_cross_entropy``.

    Sources: for the prior, Ren et al., Balanced meta-softmax, NeurIPS 2020, eq. 4; Menon et al., Long-tail learning via
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
            raise TypeError(
                f"dtype of a linear softmax must store the length of prototypes; got {FLOAT8}, which stores each "
                "prototype up to a power of two"
            )
        super().__init__(num_classes, embedding_size, scale=1.0, normalize_features=False, sub_centers=1, **options)
        self.bias = None
        if bias:  # float32 even if the weight is in half precision, and on the CPU if the weight is on "meta"
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.bias = nn.Parameter(torch.empty(num_classes, dtype=wide, device=self._constants_device))
            self._draw(self.bias)

    def reset_parameters(self) -> None:
        """Draw a new weight and bias as ``torch.nn.Linear`` does: uniform in ±1/√D."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):  # in the constructor, the weight alone
            if name != "weight":
                self._draw(parameter)

    def _draw_prototypes(self) -> None:
        self._draw(self.weight)

    def _draw(self, tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
        bound = self.embedding_size**-0.5
        return nn.init.uniform_(tensor, -bound, bound, generator)

    def _drawn_block(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self._draw(torch.empty(shape), generator)

    def logits(self, features: Tensor) -> Tensor:
        """Logits x·w_c + b_c without the prior, as used for prediction.

        Args:
            features: (N, D).

        Returns:
            (N, C), dense. For large C use :meth:`predict`.
        """
        check_pair(features, self.weight)
        return self._dense_logits(features, self.weight)

    def _logit_options(self) -> dict[str, Any]:
        return {"normalize_prototypes": False, "bias": self.bias}

    def _dense_logits(self, features: Tensor, weight: Tensor) -> Tensor:
        logits = products(features, weight)
        return logits if self.bias is None else logits + self.bias

    def hyper_parameters(self) -> dict[str, Any]:
        """Return every hyper-parameter by name."""
        names = LinearOptions.__annotations__.keys() - {"device", "dtype"}
        options = {name: value for name, value in super().hyper_parameters().items() if name in names}
        return {"bias": self.bias is not None, **options}
