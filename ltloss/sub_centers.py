"""Sub-centres: find the sub-centre of each sample, and the samples that do not belong to the main one of their class.

With K prototypes per class, clean samples gather around one of them, and mislabelled or hard ones around the others.
Train with K = 3, say. Then remove the outliers and train a model with one prototype per class on the rest.

Source: Deng et al., Sub-center ArcFace: boosting face recognition by large-scale noisy web faces, ECCV 2020, section
3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltloss._validation import (
    check_count,
    check_label_range,
    check_labels,
    check_number,
    check_sub_centers,
    check_supervised,
    check_type,
)
from ltloss.chunked.samples import cosines_of_target
from ltloss.ops._dispatch import is_sharded
from ltloss.ops.labels import checked_labels

__all__ = ["dominant", "nearest_of_target", "outliers"]


@torch.no_grad()
def nearest_of_target(
    features: Tensor, prototypes: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Find the nearest sub-centre of each sample within its own class, argmax_k cos(x_i, w_{y_i,k}).

    Args:
        features: (N, D).
        prototypes: (C, K, D), or (C, D) for K = 1.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        ignore_index: label of samples that do not count.

    Returns:
        ``(index, cosine)``: the index (N,) int64 in [0, K), the lowest of equally near ones, and the cosines (N, K) to
        all sub-centres of the class. Samples that do not count have index -1 and cosines 0.

    Raises:
        ValueError, TypeError: tensors that do not fit together, prototypes spread over ranks.
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position.

    See also: :func:`dominant`, which counts these indices; :func:`outliers`, which uses both.

    Source: Deng et al., Sub-center ArcFace, ECCV 2020, section 3.3.

    Example:
        >>> import torch
        >>> from ltloss.sub_centers import nearest_of_target
        >>> prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> nearest_of_target(torch.tensor([[0.1, 2.0], [3.0, 0.0]]), prototypes, torch.tensor([0, 0]))[0]
        tensor([1, 0])
    """
    check_supervised(features, prototypes, labels)
    ignore_index = check_type("ignore_index", ignore_index, int)
    if is_sharded(prototypes):
        raise ValueError(
            f"prototypes {tuple(prototypes.shape)} must be whole on this rank; got a DTensor spread over ranks. Use "
            "ltloss.distributed.in_one_piece of the module"
        )
    labels = checked_labels(labels, prototypes.shape[0], ignore_index, "labels")
    counted = labels != ignore_index
    cosine = cosines_of_target(features, prototypes, torch.where(counted, labels, -1))
    return torch.where(counted, cosine.argmax(1), -1), cosine


@torch.no_grad()
def dominant(index: Tensor, labels: Tensor, num_classes: int, sub_centers: int) -> Tensor:
    """Find the dominant sub-centre of each class, the one that most of its samples are nearest to.

    Args:
        index: (N,) from :func:`nearest_of_target`, -1 where a sample does not count.
        labels: (N,).
        num_classes, sub_centers: C and K.

    Returns:
        (C,) int64, the lowest of equally frequent ones; 0 for a class without samples.

    See also: :func:`nearest_of_target`; :func:`outliers`.

    Source: Deng et al., Sub-center ArcFace, ECCV 2020, section 3.3.

    Raises:
        ValueError, TypeError, IndexError: an index outside [-1, K), a label of a counted sample outside [0, C).

    Example:
        >>> import torch
        >>> from ltloss.sub_centers import dominant
        >>> dominant(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 0, 1]), num_classes=2, sub_centers=3)
        tensor([1, 2])
    """
    classes, several = check_count("num_classes", num_classes), check_sub_centers(sub_centers)
    for name, given in (("index", index), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor (N,); got {type(given).__name__}")
    check_labels(labels, index, "labels", "index")
    check_labels(index, labels, "index")
    counted = index >= 0
    check_label_range(index, several, -1, "index")
    check_label_range(labels[counted], classes, -1, "labels of counted samples")
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
    """Mark the samples that do not belong to the dominant sub-centre of their class.

    Args:
        features: (N, D) of the whole training set, from which the dominant sub-centres are counted.
        prototypes: (C, K, D).
        labels: (N,) integers in [0, C), or ``ignore_index``.
        max_angle: in radians. None: outliers are the samples whose nearest sub-centre is not the dominant one. A
            number: the samples whose angle to the dominant sub-centre exceeds it. The paper uses 75 degrees,
            ``math.radians(75)``.
        ignore_index: label of samples that do not count; they are never outliers.

    Returns:
        (N,) bool.

    Raises:
        ValueError, TypeError: tensors that do not fit together, an angle outside [0, π].
        IndexError: a label outside [0, C) that is not ``ignore_index``, with its position.

    See also: :func:`nearest_of_target`; :func:`dominant`.

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
