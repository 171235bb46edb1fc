"""pytorch-metric-learning's classification losses without the N×C logits, and a reader for its prototypes.

Replace ``from pytorch_metric_learning.losses import ArcFaceLoss`` by ``from ltloss.interop.pytorch_metric_learning
import ArcFaceLoss``. Arguments, parameter, loss and gradients stay the same. The library itself is not needed.
``docs/coming-from.md`` says what differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltloss._validation import MOST_COSINE_MARGIN, check_count, check_number, check_sub_centers
from ltloss.distributed.layout import Layout
from ltloss.extend import logsumexp_stats, margin_losses
from ltloss.interop._fill import fill
from ltloss.interop._pytorch_metric_learning import ClassificationLoss, SharedOptions, found_cosines, unknown_distance
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.reference import products
from ltloss.sub_centers import dominant, nearest_of_target

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "import_pytorch_metric_learning",
]


class ArcFaceLoss(ClassificationLoss):
    """``pytorch_metric_learning.losses.ArcFaceLoss``: logits s·cos θ_c, and s·cos(θ_y + m) for the target.

    Beyond θ + m = π the target logit is s·(cos θ − m·sin m).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in degrees, in [-180, 180].
        scale: s > 0.
        options: as in that library. ``weight_init_func`` takes ``W`` (D, C) and fills it; by default from a normal
            distribution. ``weight_regularizer`` takes the prototypes (C, D) and ``embedding_regularizer`` the
            embeddings (N, D); their results, times ``weight_reg_weight`` and ``embedding_reg_weight``, are added to the
            loss. ``reducer`` is called with ``{"loss": {"losses": (N,), "indices": (N,), "reduction_type":
            "element"}}``, embeddings and labels, and again for each regulariser. ``distance`` must compute cosines.
            ``collect_stats`` must not be True.

    Attributes:
        W: (D, C) parameter. It is stored as (C, D): ``W`` is not contiguous, its transpose ``weight`` is.
        margin: m in radians, as in that library. ``margin`` and ``scale`` may be set later.

    Raises:
        ValueError, TypeError: sizes that are no whole numbers from 1, a margin or scale out of range, another distance.

    See also: :class:`ltloss.ArcFaceLoss`, the loss without that library.

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


class SubCenterArcFaceLoss(ArcFaceLoss):
    """``pytorch_metric_learning.losses.SubCenterArcFaceLoss``: :class:`ArcFaceLoss` with K prototypes a class.

    cos θ_c is the largest cosine to the K sub-centres of class c; the gradient goes to that sub-centre.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in degrees.
        scale: s.
        sub_centers: K, 1 to 8.
        options: as for :class:`ArcFaceLoss`; ``weight_regularizer`` takes all prototypes (C·K, D).

    Attributes:
        W: (D, C·K) parameter, stored as (C·K, D). Column c·K + k is sub-centre k of class c.

    Raises:
        ValueError, TypeError: as :class:`ArcFaceLoss`, and a ``sub_centers`` out of range.

    See also: :class:`ltloss.ArcFaceLoss` with ``sub_centers``; :func:`ltloss.sub_centers.outliers`.

    Source: Deng et al., Sub-center ArcFace, ECCV 2020.

    Example:
        >>> import torch
        >>> from ltloss.interop.pytorch_metric_learning import SubCenterArcFaceLoss
        >>> loss_fn = SubCenterArcFaceLoss(num_classes=100, embedding_size=16, sub_centers=3)
        >>> embeddings, labels = torch.randn(4, 16), torch.tensor([0, 7, 99, 3])
        >>> loss_fn(embeddings, labels).shape, loss_fn.W.shape, loss_fn.get_logits(embeddings).shape
        (torch.Size([]), torch.Size([16, 300]), torch.Size([4, 100]))
        >>> outliers, dominant_centers = loss_fn.get_outliers(embeddings, labels, threshold=75)
        >>> dominant_centers.shape
        torch.Size([16, 100])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Unpack[SharedOptions],
    ) -> None:
        classes, centers = check_count("num_classes", num_classes), check_sub_centers(sub_centers)
        super().__init__(classes * centers, embedding_size, margin, scale, **options)
        self.num_classes, self.sub_centers = classes, centers

    @property
    def weight(self) -> Tensor:
        """The prototypes (C, K, D) for :mod:`ltloss.functional`: contiguous, a view of ``W``."""
        return self.W.t().reshape(self.num_classes, self.sub_centers, self.embedding_size)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Samples whose angle to the dominant sub-centre of their class exceeds ``threshold``, and these sub-centres.

        The dominant sub-centre of a class is the one that is nearest to most of its samples.

        Args:
            embeddings: (N, D), of the whole training set.
            labels: (N,).
            threshold: in degrees.
            return_dominant_centers: without effect, as in that library: both are returned.

        Returns:
            ``(outliers, dominant_centers)``: indices of samples, ordered by class, and (D, C). For a class without
            samples it is the first sub-centre.

        Raises:
            ValueError, TypeError, IndexError: tensors that do not fit together.
        """
        check_number("threshold", threshold, at_least=0.0, at_most=180.0)
        weight, labels = self.weight.to(embeddings.device), labels.to(embeddings.device)
        index, cosine = nearest_of_target(embeddings, weight, labels)
        main = dominant(index, labels, self.num_classes, self.sub_centers)
        of_own = main[torch.where(index >= 0, labels, 0)]
        away = cosine.gather(1, of_own[:, None])[:, 0] < math.cos(math.radians(threshold))
        found = (away & (index >= 0)).nonzero()[:, 0]
        order = labels[found].argsort(stable=True)
        return found[order], weight[torch.arange(len(main), device=main.device), main].t()


class CosFaceLoss(ClassificationLoss):
    """``pytorch_metric_learning.losses.CosFaceLoss``: logits s·cos θ_c, and s·(cos θ_y − m) for the target.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m in [-2, 2], subtracted from the cosine.
        scale: s > 0.
        options: as for :class:`ArcFaceLoss`.

    Raises:
        ValueError, TypeError: a margin, scale or size of another type or out of range.

    See also: :class:`ltloss.CosFaceLoss`, the loss without that library.

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
        self.margin = check_number("margin", margin, at_least=-MOST_COSINE_MARGIN, at_most=MOST_COSINE_MARGIN)
        self.scale = check_number("scale", scale, above=0.0)

    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "cosine_margin": self.margin}


class NormalizedSoftmaxLoss(ClassificationLoss):
    """``pytorch_metric_learning.losses.NormalizedSoftmaxLoss``: logits cos θ_c / T, no margin.

    Args:
        num_classes: C.
        embedding_size: D.
        temperature: T > 0.
        options: as for :class:`ArcFaceLoss`. ``distance=DotProductSimilarity(normalize_embeddings=False)`` keeps the
            length of the embedding: logits ‖x‖·cos θ_c / T.

    Raises:
        ValueError, TypeError: a temperature or size of another type or out of range.

    See also: :class:`ltloss.CosineSoftmaxLoss`, the loss without that library.

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


class SphereFaceLoss(ClassificationLoss):
    """``pytorch_metric_learning.losses.SphereFaceLoss``: logits s·‖x‖·cos θ_c, and s·‖x‖·ψ(θ_y) for the target.

    ψ(θ) = (−1)^k·cos(m·θ) − 2k for θ in [kπ/m, (k+1)π/m], k = 0, 1, ...: ψ decreases everywhere.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: m >= 1, rounded down to an integer.
        scale: s > 0.
        options: as for :class:`ArcFaceLoss`.

    Raises:
        ValueError, TypeError: a margin, scale or size of another type or out of range.

    See also: :class:`ltloss.CombinedMarginLoss` with ``angle_multiplier``, the loss without that library.

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

    See also: :class:`SphereFaceLoss`, with normalised prototypes.

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
        # Only the target needs a cosine: its logit divided by s·‖x‖·‖w‖.
        stats = stats._replace(logit_scale=self.scale * x * w, normalize_prototypes=True)
        return margin_losses(stats, angle_multiplier=self.margin)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Dense logits (N, C) without margin."""
        return self.scale * products(embeddings, self.weight)


def import_pytorch_metric_learning(head: PrototypeHead, loss: nn.Module | Mapping[str, Tensor] | Tensor) -> None:
    """Fill a head with the prototypes ``W`` (D, C) of a pytorch-metric-learning loss.

    Args:
        head: sharded or not. For a head with K sub-centres W is (D, C·K), as in ``SubCenterArcFaceLoss``.
        loss: the loss, its state_dict, or ``W`` itself; the same on all ranks.

    Raises:
        ValueError: no ``W`` there, or of another shape.

    See also: :func:`ltloss.interop.import_insightface`; :func:`ltloss.interop.import_safetensors`.

    Example:
        >>> import torch
        >>> from ltloss import ArcFaceLoss
        >>> from ltloss.interop import import_pytorch_metric_learning
        >>> import_pytorch_metric_learning(ArcFaceLoss(10, 4), {"W": torch.randn(4, 10)})
    """
    given = loss.state_dict() if isinstance(loss, nn.Module) else loss
    matrix = given.get("W") if isinstance(given, Mapping) else given
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else "none"
        raise ValueError(
            "loss must be or hold a tensor W (D, C), as pytorch-metric-learning's classification losses do; got "
            f"{found}"
        )
    rows = matrix.t()
    if head.sub_centers > 1 and len(rows) % head.sub_centers == 0:
        rows = rows.reshape(-1, head.sub_centers, len(matrix))
    start, stop = Layout.of(head.weight).span()
    fill(head, tuple(rows.shape), "W of pytorch-metric-learning", rows[start:stop])
