"""Host side of the backward: for each slab of classes dZ, two products with it, and the projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ltloss_kernels.backward_pass import BackwardPass
from ltloss_kernels.config import choices
from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import parts_of_product
from ltloss_kernels.config.operands import multiply_add, multiply_add_in_parts, part, vector
from ltloss_kernels.cosine_logsumexp import LOG2E
from ltloss_kernels.exponentials import Exponentials
from ltloss_kernels.prototype_update import PrototypeUpdate
from ltloss_kernels.row_norms import row_norms
from ltloss_kernels.running import on_device, widened

__all__ = ["gradients"]


def gradients(
    grad_loss: Tensor,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    coefficients: Tensor,
    class_scale: Tensor,
    inverse_weight_sum: Tensor | None,
    max_coefficient: Tensor,
    scale: float,
    smooth: bool,
    normalize_features: bool,
    normalize_prototypes: bool,
    ignore_index: int | None,
    threshold: Tensor | None,
    polynomial: Tensor | None,
    needs: Sequence[bool],
    take: Callable[[int, int, Tensor], None] | None = None,
    update: PrototypeUpdate | None = None,
    kept: Exponentials | None = None,
    *,
    limit: Callable[[], int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features (N, D), of prototypes as they are shaped, and of the prior through r, (C,).

    The last is Σ_i a_i·exp(l_ic - r_i) over the samples of other classes, float32: the part of the prior's gradient
    that flows through the log-sum-exps r.

    Args:
        grad_loss: upstream gradient, a scalar or (N,) of any stride.
        features, prototypes, labels, log_prior, scale, normalize_*: as for ``partials``.
        coefficients: (4 or 5, N) of ``margin_loss``; with labels (N, k), k - 1 more rows: d_target of the later labels.
        class_scale: (C,) or (C, K), as ``partials`` returned it.
        inverse_weight_sum: scalar that multiplies the upstream gradient, or None.
        max_coefficient: scalar, the largest |coefficient|; read for float16 only.
        smooth: whether row 3 of the coefficients is used.
        ignore_index: rows with this label may hold anything, also NaN; None: all rows count.
        threshold, polynomial: as for ``partials``.
        needs: which of the three are computed.
        take: called as ``take(start, stop, gradient)``, slab by slab, with the float32 gradient of the prototypes
            [start, stop). It may change these prototypes. The next slab reuses the memory of the gradient.
        update: moves the prototypes where their gradient is made; then give no ``take``, and at least one sample.
        kept: the exponentials that ``partials`` filled; the logits are then not computed again.
        limit: returns how many bytes may be taken beside the gradients, see ``backward_plan``.

    Returns:
        The three gradients, the first two in the dtype of their tensor; (0,) for one that is not needed.
    """
    if features.shape[0] == 0:
        nothing, zero = torch.empty_like(features), torch.zeros_like(prototypes)
        sums = features.new_zeros(len(prototypes) if needs[2] else 0, dtype=torch.float32)
        return _like(nothing if needs[0] else None, features), _like(zero if needs[1] else None, prototypes), sums
    with on_device(features):
        run = BackwardPass(
            widened(features),
            widened(prototypes if prototypes.dim() == 2 else prototypes.flatten(0, -2)),
            prototypes.shape[1] if prototypes.dim() == 3 else 1,
            labels,
            vector(log_prior),
            scale,
            normalize_features,
            normalize_prototypes,
            ignore_index,
            threshold,
            polynomial,
        )
        scales = class_scale if class_scale.dim() == 1 else class_scale.flatten()
        run.take(grad_loss, coefficients, scales, inverse_weight_sum, max_coefficient, smooth)
        if kept is not None:
            run.take_kept(kept)
        run.allocate(needs[0], needs[1], needs[2], limit(), take is not None, update)
        run.launch_samples()
        for slab in run.slabs():
            if slab.copy_factor is not None:
                row_norms(
                    slab.prototypes,
                    copy=slab.operand,
                    copy_factor=slab.copy_factor,
                    factor_scale=run.scale * LOG2E,
                    normalize=normalize_prototypes,
                    launch=run.launch,
                )
            for rows in _spans(len(features), run.plan.rows):
                for k, tile in enumerate(run.launch_tiles(rows, slab)):
                    if run.feature_sum is not None:
                        operand = _of_center(slab.operand, k, run.sub_centers)
                        _add_to_features(part(run.feature_sum, rows), tile, operand, overwrite=slab.first == k == 0)
                    if run.along is not None:
                        run.launch_prototypes(tile, slab)
                    elif slab.sum is not None:
                        target = _of_center(slab.sum, k, run.sub_centers)
                        multiply_add(target, tile.t(), part(run.unit, rows), overwrite=rows.start == 0)
            run.launch_projection(slab)
            if take is not None and slab.grad is not None:
                grad = slab.grad if prototypes.dim() == 2 else slab.grad.view(-1, *prototypes.shape[1:])
                take(slab.first, slab.first + len(grad), grad)
    sums = features.new_empty(0, dtype=torch.float32) if run.through_r is None else run.through_r
    grad_prototypes = run.grad_prototypes if needs[1] else None
    if grad_prototypes is not None and prototypes.dim() == 3:
        grad_prototypes = grad_prototypes.view(prototypes.shape)
    return _like(run.grad_features, features), _like(grad_prototypes, prototypes), sums


def _spans(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def _of_center(matrix: Tensor, k: int, sub_centers: int) -> Tensor:
    """Sub-centre k of each class, (c, D), from rows (c·K, D)."""
    return matrix if sub_centers == 1 else matrix[k::sub_centers]


def _add_to_features(target: Tensor, dz: Tensor, prototypes: Tensor, *, overwrite: bool) -> None:
    """target (n, D) += dZ (n, c) @ prototypes (c, D), or = with ``overwrite``."""
    if choices.tried("parts of K"):
        (rows, classes), slots = dz.shape, tiles.multiprocessors(dz.device)
        parts = parts_of_product(rows, target.shape[1], classes, slots)
        multiply_add_in_parts(target, dz, prototypes, parts, overwrite=overwrite)
    else:
        multiply_add(target, dz, prototypes, overwrite=overwrite)


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
