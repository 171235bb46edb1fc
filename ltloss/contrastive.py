"""Contrastive losses: the samples of a batch, or of a memory queue, take the place of the classes.

No function stores the N×N logits, or N×K for a queue of K entries, neither forward nor backward. Losses are float32, or
float64 if an input is float64. Each gradient has the dtype of its tensor. Every loss has a dense twin of the same
signature in :mod:`ltloss.reference`. In a process group, each rank uses its own batch only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ltloss import reference
from ltloss._types import Reduction
from ltloss._validation import check_labels, check_matrices, check_scalar, check_type
from ltloss.errors import BackendError
from ltloss.extend import logsumexp_stats, margin_losses, reduce_losses
from ltloss.margins import Objective
from ltloss.numerics import add_rows_, compute_dtype
from ltloss.ops import in_batch
from ltloss.ops import stats as ops
from ltloss.ops._dispatch import choose_backend
from ltloss.reference import direction
from ltloss.runtime import current_backend

__all__ = ["info_nce", "siglip_loss", "supervised_contrastive"]


def info_nce(
    a: Tensor, b: Tensor, *, scale: float | Tensor, symmetric: bool = True, reduction: Reduction = "mean"
) -> Tensor:
    """CLIP's loss (InfoNCE): row i of ``a`` shall identify row i of ``b`` among all rows, and vice versa.

    With l_ij = s·cos(a_i, b_j): ℓ_i = ½·(−log softmax_j(l_ij)_i − log softmax_j(l_ji)_i).

    Args:
        a: (N, D), any length, any floating dtype.
        b: (N, D), likewise; its row i belongs to row i of ``a``.
        scale: s > 0, the inverse temperature: a number, or a 0-d tensor with gradient (CLIP's ``logit_scale.exp()``).
        symmetric: False keeps only the direction from ``a`` to ``b``: ℓ_i = −log softmax_j(l_ij)_i (CPC, MoCo, SimCSE).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``; float32, or float64 if an input is float64. 0 for a batch of one.

    Raises:
        ValueError, TypeError: batches of different shapes, a scale that is not positive, an unknown reduction.

    See also: :func:`siglip_loss`, without a softmax; :func:`supervised_contrastive`, with several positives.

    Sources: Radford et al., CLIP, ICML 2021, fig. 3; van den Oord et al., CPC, 2018, eq. 4.

    Example:
        >>> import torch
        >>> from ltloss.contrastive import info_nce
        >>> info_nce(torch.eye(3), 2 * torch.eye(3), scale=2.0)
        tensor(0.2395)
    """
    like = _checked_pair(a, b)
    check_type("symmetric", symmetric, bool)
    multiplier = check_scalar("scale", scale, like, above=0.0)
    own = torch.arange(a.shape[0], device=a.device)
    if a.shape[0] == 0:
        losses = (a.to(like.dtype) * b.to(like.dtype)).sum(1)
    elif symmetric and choose_backend(a, b) == "torch":
        of_a, of_b, target = in_batch.logsumexp(a, b, multiplier)
        losses = -(F.logsigmoid(target - of_a) + F.logsigmoid(target - of_b)) / 2
    else:
        losses = margin_losses(logsumexp_stats(a, b, own, scale=scale))
        if symmetric:
            losses = (losses + margin_losses(logsumexp_stats(b, a, own, scale=scale))) / 2
    return reduce_losses(losses, own, reduction=reduction)


def siglip_loss(a: Tensor, b: Tensor, *, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """SigLIP's loss: a binary classification of every pair, whether its two rows belong together.

    L = −(1/N) Σ_i Σ_j log σ(z_ij·(s·cos(a_i, b_j) + bias)), with z_ij = 1 where i = j and −1 elsewhere.

    Args:
        a: (N, D), any length, any floating dtype.
        b: (N, D), likewise; its row i belongs to row i of ``a``.
        scale: s > 0: a number, or a 0-d tensor with gradient. In the paper, exp of a parameter that starts at ln 10.
        bias: a number, or a 0-d tensor with gradient. In the paper it starts at −10, because most pairs do not belong
            together.

    Returns:
        A scalar; float32, or float64 if an input is float64. It is computed in PyTorch, tile by tile, on every device.
        The gradients are computed in the forward too, if needed. They are held until the backward: the memory of two
        float32 batches.

    Raises:
        ValueError, TypeError: batches of different shapes, a scale that is not positive, a bias that is not finite.
        BackendError: under ``ltloss.use_backend("triton")``, because there are no kernels for this loss.

    See also: :func:`info_nce`, with a softmax over the batch.

    Source: Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, eq. 2.

    Example:
        >>> import torch
        >>> from ltloss.contrastive import siglip_loss
        >>> siglip_loss(torch.eye(3), 2 * torch.eye(3), scale=10.0, bias=-10.0)
        tensor(0.6932)
    """
    like = _checked_pair(a, b)
    scale, bias = check_scalar("scale", scale, like, above=0.0), check_scalar("bias", bias, like)
    backend = choose_backend(a, b)
    if backend == "reference" or a.shape[0] == 0:
        return reference.siglip_loss(a, b, scale=scale, bias=bias)
    if current_backend() == "triton":
        raise BackendError("siglip_loss has no kernels for backend 'triton'; use 'auto' or 'torch'")
    return in_batch.sigmoid_loss(a, b, scale, bias)


def _checked_pair(a: Tensor, b: Tensor) -> Tensor:
    """Check the two batches; return an empty tensor in the dtype of the sums."""
    check_matrices(a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape (N, D); got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.new_empty(0, dtype=compute_dtype(a, b))


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    queue_features: Tensor,
    queue_labels: Tensor,
    *,
    scale: float | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """Supervised contrastive loss over a memory queue: the entries with a sample's label are its positives.

    With l_ik = s·cos(x_i, q_k) and P_i the entries of label y_i: ℓ_i = −(1/|P_i|) Σ_{k∈P_i} log softmax_k(l_i)_k.

    Args:
        features: (N, D), any length, any floating dtype.
        labels: (N,) integers of any value.
        queue_features: (K, D), any length: earlier batches, other views of this batch, or both. They get a gradient if
            they require one. A sample that is itself in the queue is one of its own positives.
        queue_labels: (K,) integers.
        scale: s > 0, the inverse temperature: a number, or a 0-d tensor with gradient.
        reduction: ``"mean"`` over the samples that have a positive, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (N,) for ``"none"``; float32, or float64 if an input is float64. A sample without positives, and
        every sample if the queue is empty, has loss 0 and no gradient.

    Raises:
        ValueError, TypeError: tensors that do not fit together, a scale that is not positive, an unknown reduction.

    See also: :func:`info_nce`, with one positive per sample; :class:`ltloss.CosineSoftmaxLoss`, with a learned
    prototype per class instead of a queue.

    Source: Khosla et al., Supervised contrastive learning, NeurIPS 2020, eq. 2 (L_out).

    Example:
        >>> import torch
        >>> from ltloss.contrastive import supervised_contrastive
        >>> queue, queue_labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> supervised_contrastive(torch.eye(3)[:2], torch.tensor([0, 7]), queue, queue_labels, scale=2.0)
        tensor(1.2395)
    """
    check_matrices(features=features, queue_features=queue_features)
    check_labels(features, labels)
    check_labels(queue_features, queue_labels, "queue_features", "queue_labels")
    like = features.new_empty(0, dtype=compute_dtype(features, queue_features))
    u = direction(features.to(like.dtype)) * check_scalar("scale", scale, like, above=0.0)
    if features.shape[0] and queue_features.shape[0]:
        queue = queue_features.to(like.dtype)  # once, so that the sum of its two gradients is rounded once
        positives, count = _mean_positives(labels.to(torch.int64), queue, queue_labels.to(torch.int64))
        # The log-sum-exp is over all entries, positives too. The mean of the positives' logits is the logit of their
        # mean direction.
        nobody = Objective(scale=1.0, normalize_features=False, ignore_index=None)
        outside = torch.full_like(count, -1, dtype=torch.int64)
        logsumexp, _, _ = ops.logsumexp_stats(u, queue, outside, nobody, False)
        losses = torch.where(count > 0, logsumexp - (u * positives).sum(1), 0.0)
    else:
        losses, count = u.sum(1) * 0.0, u.new_zeros(u.shape[0])
    return reduce_losses(losses, torch.where(count > 0, 0, -1), reduction=reduction)


def _mean_positives(labels: Tensor, queue: Tensor, queue_labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample, the mean direction of its positives (N, D) and their number (N,), without an N×K mask.

    The sums are kept in a table with N rows, one for each sorted label; equal labels use the first of their rows. Its
    size does not depend on the labels, so the host need not wait for a GPU.
    """
    ordered = labels.sort().values
    unit = direction(queue)
    row = torch.searchsorted(ordered, queue_labels).clamp_max(len(ordered) - 1)
    same = ordered[row] == queue_labels
    sums = add_rows_(queue.new_zeros(len(ordered), queue.shape[1]), row, unit.masked_fill(~same[:, None], 0.0))
    counts = add_rows_(queue.new_zeros(len(ordered)), row, same.to(queue.dtype))
    own = torch.searchsorted(ordered, labels)
    return sums[own] / counts[own].clamp_min(1.0)[:, None], counts[own]
