"""pytorch-metric-learning's classification losses, without the N×C logits; and the prototypes of its own.

``from ltloss.interop.pytorch_metric_learning import ArcFaceLoss`` in the place of ``from
pytorch_metric_learning.losses import ArcFaceLoss`` is all that changes: arguments, parameter, loss and gradients are
the same. The package itself is not needed. ``docs/coming-from.md`` says what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ltloss import functional as F
from ltloss._validation import check_count, check_number
from ltloss.distributed.layout import Layout
from ltloss.extend import logsumexp_stats, margin_losses
from ltloss.interop._fill import fill
from ltloss.interop._pytorch_metric_learning import found_cosines, miner_weights, unknown_distance
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.reference import cosine_logits, products

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SphereFaceLoss",
    "import_pytorch_metric_learning",
]


class SharedOptions(TypedDict, total=False):
    """What each of the losses takes besides its own numbers, as in pytorch-metric-learning."""

    weight_init_func: Callable[[Tensor], Any] | None
    weight_regularizer: Callable[[Tensor], Any] | None
    weight_reg_weight: float
    embedding_regularizer: Callable[[Tensor], Any] | None
    embedding_reg_weight: float
    reducer: Callable[..., Any] | None
    distance: Callable[..., Tensor] | None
    collect_stats: bool | None


class _ClassificationLoss(nn.Module):
    """What the losses have in common: ``W``, weights of a miner, regularisers and the reducer."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        weight_regularizer: Callable[[Tensor], Any] | None = None,
        weight_reg_weight: float = 1.0,
        embedding_regularizer: Callable[[Tensor], Any] | None = None,
        embedding_reg_weight: float = 1.0,
        reducer: Callable[..., Any] | None = None,
        distance: Callable[..., Tensor] | None = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        if collect_stats:
            raise ValueError("collect_stats must be None or False, for no statistics are kept here; got True")
        self.num_classes = check_count("num_classes", num_classes)
        self.embedding_size = check_count("embedding_size", embedding_size)
        self.distance, self._normalized = distance, self._normalizes(distance)
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight
        self.embedding_regularizer, self.embedding_reg_weight = embedding_regularizer, embedding_reg_weight
        self.reducer = reducer
        # (D, C) by name and shape, but stored as (C, D): what is computed with is a view, and so is its gradient.
        self.W = nn.Parameter(torch.empty(self.num_classes, self.embedding_size).t())
        drawn = torch.empty(self.W.shape)  # in the order of W, so that a seed draws what it draws there
        with torch.no_grad():
            (weight_init_func or nn.init.normal_)(drawn)
            self.W.copy_(drawn)

    @property
    def weight(self) -> Tensor:
        """The prototypes (C, D), contiguous, in the memory of ``W``: for :mod:`ltloss.functional`."""
        return self.W.t()

    def _normalizes(self, distance: Callable[..., Tensor] | None) -> bool:
        """Whether the embeddings are normalised; ValueError for a distance that is none of ours."""
        if distance is None or found_cosines(distance, self.embedding_size)[0]:
            return True
        raise unknown_distance(distance, "the cosines, as CosineSimilarity() does")

    def _options(self) -> dict[str, Any]:
        """Of :func:`ltloss.functional.margin_cross_entropy`."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Loss of embeddings (N, D) with labels (N,): the mean, or what the reducer makes of the losses.

        Args:
            embeddings: (N, D).
            labels: (N,) integers in [0, C); -100 has loss 0 and counts in the mean, as in ``F.cross_entropy`` without
                reduction.
            indices_tuple: of a miner. A sample's loss is multiplied by how often it stands there, divided by how often
                the most frequent does.
            ref_emb, ref_labels: None, as prototypes are what embeddings are compared with.

        Raises:
            ValueError, TypeError, IndexError: no labels, ``ref_emb``, tensors that do not fit together.
        """
        if labels is None:
            raise ValueError(f"labels must be a tensor ({embeddings.shape[0]},) of classes; got None")
        if ref_emb is not None and (ref_emb is not embeddings or ref_labels is not labels):
            raise ValueError("ref_emb and ref_labels must be None: embeddings are compared with prototypes")
        if self.W.device != embeddings.device:  # in place, so that an optimizer over W stays one
            self.W.data = self.W.data.to(embeddings.device)
        labels = labels.to(embeddings.device)
        losses = self._losses(embeddings, labels)
        losses = losses * miner_weights(indices_tuple, losses)
        samples = torch.arange(losses.shape[0], device=losses.device)
        found: dict[str, dict[str, Any]] = {
            "loss": {"losses": losses, "indices": samples, "reduction_type": "element"},
        }
        for name, regularizer, factor, argument in (
            ("weight_reg_loss", self.weight_regularizer, self.weight_reg_weight, self.weight),
            ("embedding_reg_loss", self.embedding_regularizer, self.embedding_reg_weight, embeddings),
        ):
            if regularizer is not None:
                value = regularizer(argument) * factor
                found[name] = {"losses": value, "indices": None, "reduction_type": "already_reduced"}
        return self._reduced(found, embeddings, labels)

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(N,), not weighted."""
        return F.margin_cross_entropy(embeddings, self.weight, labels, reduction="none", **self._options())

    def _reduced(self, found: dict[str, dict[str, Any]], embeddings: Tensor, labels: Tensor) -> Any:
        """The sum of what the reducer makes of each part; of a reducer of all parts, what that returns."""
        if self.reducer is None:
            losses = found.pop("loss")["losses"]
            mean = losses.sum() / max(len(losses), 1)
            return sum((part["losses"] for part in found.values()), start=mean)
        if not _OF_ALL.isdisjoint(kind.__name__ for kind in type(self.reducer).__mro__):
            return self.reducer(found, embeddings, labels)
        first, *others = (self.reducer({name: part}, embeddings, labels) for name, part in found.items())
        return sum(others, start=first)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin (N, C), dense; with many classes take ``ltloss.functional.top_k(x, loss.weight)``."""
        options = self._options()
        normalize_features = options.get("normalize_features", True)
        return cosine_logits(embeddings, self.weight, options["scale"], normalize_features)

    def extra_repr(self) -> str:
        """Shape and what is computed."""
        options = "".join(f", {name}={value}" for name, value in self._options().items())
        return f"{self.num_classes}, {self.embedding_size}{options}"


_OF_ALL = {"MultipleReducers", "DoNothingReducer"}  # reducers that take all parts of the loss in one call


class ArcFaceLoss(_ClassificationLoss):
    """``pytorch_metric_learning.losses.ArcFaceLoss``: logits s·cos θ_c, and s·cos(θ_y + m) for the target.

    Beyond θ + m = π the target's is s·(cos θ − m·sin m).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in degrees.
        scale: s.
        options: ``weight_init_func`` takes ``W`` and fills it, a normal distribution by default. ``weight_regularizer``
            takes the prototypes (C, D), ``embedding_regularizer`` the embeddings (N, D); times ``weight_reg_weight``
            and ``embedding_reg_weight`` they are added. ``reducer`` is called with ``{"loss": {"losses": (N,),
            "indices": (N,), "reduction_type": "element"}}``, embeddings and labels, and once for each regulariser. Of
            distances only the cosine.

    Attributes:
        W: (D, C) parameter. It lies in memory as (C, D), so ``W`` is not contiguous and ``weight``, its transpose, is.
        margin: in radians, as there; ``margin`` and ``scale`` may be set later.

    Raises:
        ValueError, TypeError: sizes that are no whole numbers from 1, a margin or scale out of range, another distance.

    Source: Deng et al., ArcFace, CVPR 2019, eq. 3.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import ArcFaceLoss
        >>> loss_fn = ArcFaceLoss(num_classes=100, embedding_size=16, margin=28.6, scale=64)
        >>> embeddings, labels = torch.randn(4, 16, requires_grad=True), torch.tensor([0, 7, 99, 3])
        >>> loss_fn(embeddings, labels).backward()
        >>> list(loss_fn.state_dict()), loss_fn.W.shape, loss_fn.get_logits(embeddings).shape
        (['W'], torch.Size([16, 100]), torch.Size([4, 100]))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        if not abs(check_number("margin", margin)) <= 180.0:
            raise ValueError(f"margin must lie in [-180, 180] degrees; got {margin}")
        self.margin, self.scale = math.radians(margin), check_number("scale", scale, above=0.0)

    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "angular_margin": self.margin, "beyond_pi": "arcface"}


class CosFaceLoss(_ClassificationLoss):
    """``pytorch_metric_learning.losses.CosFaceLoss``: logits s·cos θ_c, and s·(cos θ_y − m) for the target.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m, a cosine.
        scale: s.
        options: as of :class:`ArcFaceLoss`.

    Source: Wang et al., CosFace, CVPR 2018, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import CosFaceLoss
        >>> loss_fn = CosFaceLoss(100, 16, margin=0.35, scale=64)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: float = 0.35,
        scale: float = 64,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = check_number("margin", margin), check_number("scale", scale, above=0.0)

    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "cosine_margin": self.margin}


class NormalizedSoftmaxLoss(_ClassificationLoss):
    """``pytorch_metric_learning.losses.NormalizedSoftmaxLoss``: logits cos θ_c / T, no margin.

    Args:
        num_classes: C.
        embedding_size: D.
        temperature: T.
        options: as of :class:`ArcFaceLoss`. ``distance=DotProductSimilarity(normalize_embeddings=False)`` keeps the
            length of the embedding: logits ‖x‖·cos θ_c / T.

    Source: Zhai and Wu, Classification is a strong baseline for deep metric learning, BMVC 2019.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import NormalizedSoftmaxLoss
        >>> loss_fn = NormalizedSoftmaxLoss(100, 16, temperature=0.05)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, temperature: float = 0.05, **options: Unpack[SharedOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.temperature = check_number("temperature", temperature, above=0.0)

    def _normalizes(self, distance: Callable[..., Tensor] | None) -> bool:
        cosine, scaled = (True, False) if distance is None else found_cosines(distance, self.embedding_size)
        if cosine or scaled:
            return cosine
        raise unknown_distance(distance, "cosines or products, as DotProductSimilarity() and CosineSimilarity() do")

    def _options(self) -> dict[str, Any]:
        return {"scale": 1.0 / self.temperature, "normalize_features": self._normalized}


class SphereFaceLoss(_ClassificationLoss):
    """``pytorch_metric_learning.losses.SphereFaceLoss``: logits s·‖x‖·cos θ_c, and s·‖x‖·ψ(θ_y) for the target.

    ψ(θ) = (−1)^k·cos(m·θ) − 2k on the k-th stretch [kπ/m, (k+1)π/m]: it falls everywhere.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m >= 1; its whole part counts.
        scale: s.
        options: as of :class:`ArcFaceLoss`.

    Source: Liu et al., SphereFace, CVPR 2017, eq. 7.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import SphereFaceLoss
        >>> loss_fn = SphereFaceLoss(100, 16, margin=4, scale=1)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin = int(check_number("margin", margin, at_least=1))
        self.scale = check_number("scale", scale, above=0.0)

    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "angle_multiplier": self.margin, "normalize_features": False}


class LargeMarginSoftmaxLoss(SphereFaceLoss):
    """``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``: :class:`SphereFaceLoss` times the prototype's length.

    Logits s·x·w_c, and s·‖x‖·‖w_y‖·ψ(θ_y) for the target.

    Source: Liu et al., Large-margin softmax, ICML 2016, eq. 4 to 6.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import LargeMarginSoftmaxLoss
        >>> loss_fn = LargeMarginSoftmaxLoss(100, 16, margin=4, scale=1)
        >>> loss_fn(torch.randn(4, 16), torch.tensor([0, 7, 99, 3])).shape
        torch.Size([])
    """

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        stats = logsumexp_stats(
            embeddings, self.weight, labels, scale=self.scale, normalize_features=False, normalize_prototypes=False
        )
        counted = embeddings.masked_fill(stats.labels[:, None] < 0, 0.0)
        pairs, dtype = (counted, self.weight[stats.labels.clamp_min(0)]), stats.target_logit.dtype
        x, w = (torch.linalg.vector_norm(rows, dim=1, dtype=dtype) for rows in pairs)
        # Only the target needs its cosine: the logit divided by what multiplies it.
        stats = stats._replace(logit_scale=self.scale * x * w, normalize_prototypes=True)
        return margin_losses(stats, angle_multiplier=self.margin)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin (N, C), dense."""
        return self.scale * products(embeddings, self.weight)


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
