"""Which of a class's sub-centres a sample belongs to, and which samples belong to none of those that count.

With K prototypes a class, clean samples gather around one of them and wrong or hard ones around the others. Training
starts with K of 3, say; then the outliers are left out, and a model with one prototype a class is trained on the rest.

Source: Deng et al., Sub-center ArcFace: boosting face recognition by large-scale noisy web faces, ECCV 2020, section
3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._validation import check_number, check_supervised
from ltloss.chunked.samples import cosines_of_target
from ltloss.ops._dispatch import is_sharded
from ltloss.ops.labels import checked_labels

__all__ = ["dominant", "nearest_of_target", "outliers"]


@torch.no_grad()
def nearest_of_target(
    features: Tensor, prototypes: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The sub-centre of its own class that each sample is nearest to.

    Args:
        features: (N, D).
        prototypes: (C, K, D), or (C, D) for K = 1.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        ignore_index: label of samples that do not count.

    Returns:
        ``(index, cosine)``: (N,) int64 in [0, K), of equally near ones the lowest, -1 for samples that do not count;
        and (N, K) the cosines to all of them, 0 for those samples.

    Raises:
        ValueError, TypeError, IndexError: tensors that do not fit together, prototypes spread over ranks.

    Example:
        >>> import torch
        >>> from ltloss.sub_centers import nearest_of_target
        >>> prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> nearest_of_target(torch.tensor([[0.1, 2.0], [3.0, 0.0]]), prototypes, torch.tensor([0, 0]))[0]
        tensor([1, 0])
    """
    check_supervised(features, prototypes, labels)
    if is_sharded(prototypes):
        raise ValueError(
            f"prototypes {tuple(prototypes.shape)} must be in one piece; got them spread over ranks: take "
            "ltloss.distributed.in_one_piece of the module"
        )
    labels = checked_labels(labels, prototypes.shape[0], ignore_index, "labels").to(torch.int64)
    counted = labels != ignore_index
    cosine = cosines_of_target(features, prototypes, torch.where(counted, labels, -1))
    return torch.where(counted, cosine.argmax(1), -1), cosine


@torch.no_grad()
def dominant(index: Tensor, labels: Tensor, num_classes: int, sub_centers: int) -> Tensor:
    """The sub-centre of each class that most of its samples are nearest to.

    Args:
        index: (N,) of :func:`nearest_of_target`, -1 where a sample does not count.
        labels: (N,).
        num_classes, sub_centers: C and K.

    Returns:
        (C,) int64; of equally frequent ones the lowest, 0 for a class without samples.

    Example:
        >>> import torch
        >>> from ltloss.sub_centers import dominant
        >>> dominant(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 0, 1]), num_classes=2, sub_centers=3)
        tensor([1, 2])
    """
    counted = index >= 0
    place = labels[counted].to(torch.int64) * sub_centers + index[counted]
    return torch.bincount(place, minlength=num_classes * sub_centers).view(num_classes, sub_centers).argmax(1)


def outliers(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    max_angle: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Samples that do not belong to the dominant sub-centre of their class.

    Args:
        features: (N, D), of the whole training set: which sub-centre is dominant is counted here.
        prototypes: (C, K, D).
        labels: (N,) integers in [0, C), or ``ignore_index``.
        max_angle: in radians. None: those whose nearest sub-centre is another one. A number: those whose angle to the
            dominant sub-centre exceeds it; the paper takes 75 degrees, ``math.radians(75)``.
        ignore_index: label of samples that are no outliers, and count for no sub-centre.

    Returns:
        (N,) bool.

    Raises:
        ValueError, TypeError, IndexError: tensors that do not fit together, an angle outside [0, π].

    Source: Deng et al., Sub-center ArcFace, ECCV 2020, section 3.3.

    Example:
        >>> import torch
        >>> from ltloss.sub_centers import outliers
        >>> prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> outliers(torch.tensor([[2.0, 0.1], [3.0, 0.0], [0.0, 1.0]]), prototypes, torch.zeros(3, dtype=torch.int64))
        tensor([False, False,  True])
    """
    if max_angle is not None:
        check_number("max_angle", max_angle, at_least=0.0, at_most=3.1416)
    index, cosine = nearest_of_target(features, prototypes, labels, ignore_index=ignore_index)
    counted, own = index >= 0, torch.where(index >= 0, labels, 0).to(torch.int64)
    main = dominant(index, own, prototypes.shape[0], cosine.shape[1])[own]
    if max_angle is None:
        return counted & (index != main)
    angle = cosine.gather(1, main[:, None])[:, 0].clamp(-1.0, 1.0).acos()
    return counted & (angle > max_angle)
