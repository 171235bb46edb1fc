"""The per-sample inputs of a pass: labels, scaled features and target cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltloss.numerics import compute_dtype, inverse_norm, spans
from ltloss.reference import direction

__all__ = [
    "NOT_HERE",
    "columns",
    "cosines_of_target",
    "counted",
    "length",
    "scaled_features",
    "target_cosine",
    "target_labels",
]

# No target here, and neither a class nor ignored.
NOT_HERE, _NOT_A_CLASS = -1, -2


def columns(labels: Tensor) -> tuple[Tensor, ...]:
    """Labels (N,), or of samples with several (N, k) those of each place; the first says whether a sample counts."""
    return (labels,) if labels.dim() == 1 else labels.unbind(1)


def target_labels(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Labels, int64, as the passes use them: a class, NOT_HERE for no target, or what is never one."""
    labels = labels.to(torch.int64)
    outside = (labels < 0) | (labels >= num_classes)
    if ignore_index is None:
        return labels.masked_fill(outside, NOT_HERE)
    return labels.masked_fill(outside, _NOT_A_CLASS).masked_fill(labels == ignore_index, NOT_HERE)


def counted(vectors: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    """Return the vectors with ignored rows set to zero: they may hold anything, even NaN."""
    return vectors if ignore_index is None else vectors.masked_fill((columns(labels)[0] == NOT_HERE)[:, None], 0.0)


def length(features: Tensor, labels: Tensor, ignore_index: int | None, dtype: torch.dtype) -> Tensor:
    """‖x‖ (N,), through float64, so that no square leaves its range; 0 where the direction is 0."""
    features = counted(features, labels, ignore_index)
    norm = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)
    return torch.where(norm < torch.finfo(dtype).tiny, 0.0, norm).to(dtype)


def target_cosine(
    features: Tensor,
    prototypes: Tensor,
    inverse: Tensor | None,
    labels: Tensor,
    normalize_features: bool,
    ignore_index: int | None,
) -> Tensor:
    """cos_y per sample in float64, 0 without a target here, NaN for a label that is no class.

    Without ``inverse`` x̂·w_y, or x·w_y. Of several sub-centres that of the nearest. N·D work. Near ±1 an angular margin
    magnifies the rounding of the cosine by 1/sin θ, so it is not taken from a tile.
    """
    if labels.dim() == 2:
        given = features, prototypes, inverse
        each = [target_cosine(*given, one, normalize_features, ignore_index) for one in columns(labels)]
        return torch.stack(each, 1)
    here = labels >= 0
    cosine = features.new_zeros(features.shape[0], dtype=torch.float64)
    for start, stop in spans(features.shape[0], 1024):  # two small float64 copies, not two of all N rows
        rows = slice(start, stop)
        target = torch.where(here[rows], labels[rows], 0)
        x = counted(features[rows], labels[rows], ignore_index).double()
        w = prototypes[target].double()
        x = x if w.dim() == 2 else x[:, None]
        product = torch.linalg.vecdot(x, w)
        if inverse is not None:
            lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w, dim=-1)
            zero = (lengths == 0) | (inverse[target] == 0)
            product.div_(torch.where(zero, math.inf, lengths)).clamp_(-1.0, 1.0)
        elif normalize_features:
            product.mul_(inverse_norm(x, torch.float64))
        cosine[rows] = product if product.dim() == 1 else product.amax(1)
    cosine = torch.where(here, cosine, 0.0)
    return cosine.masked_fill_(labels == _NOT_A_CLASS, math.nan)


@torch.no_grad()
def cosines_of_target(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Cosines (N, K) to the sub-centres of each sample's class, or (N, 1).

    0 where the label is negative, NaN where it is no class.
    """
    several = prototypes if prototypes.dim() == 3 else prototypes[:, None]
    dtype, counted = compute_dtype(features, prototypes), labels >= 0
    cosine = features.new_zeros(len(features), several.shape[1], dtype=dtype)
    for start, stop in spans(len(features) if len(prototypes) else 0, 1024):  # a rank may have no classes
        rows = slice(start, stop)
        x = direction(features[rows].masked_fill(~counted[rows, None], 0.0).to(dtype))
        own = several[labels[rows].clamp(0, len(several) - 1)].to(dtype)
        # No product of matrices, which autocast would take in half precision.
        cosine[rows] = (x[:, None] * direction(own.flatten(0, 1)).view_as(own)).sum(2)
    cosine.masked_fill_(~counted[:, None], 0.0)
    return cosine.masked_fill_((labels >= len(several))[:, None], math.nan) if len(several) else cosine


def scaled_features(
    features: Tensor,
    labels: Tensor,
    scale: float,
    normalize_features: bool,
    ignore_index: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """u = s·x̂, or s·x where features keep their length; 0 where ignored."""
    u = counted(features, labels, ignore_index).to(dtype)
    if normalize_features:
        u = u * inverse_norm(u, dtype)[:, None]  # one factor at a time: inverse * scale may overflow for a tiny row
    return u * scale
