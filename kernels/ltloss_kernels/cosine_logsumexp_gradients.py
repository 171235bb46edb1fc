"""The backward on the host: a slab of dZ at a time, two library products on it, and the projections."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import backward_plan, ceil_div
from ltloss_kernels.config.operands import (
    block_source,
    multiply_add,
    padded_matrix,
    product_dtype,
    readable_in_place,
    vector,
)
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.cosine_logsumexp import LOG2E
from ltloss_kernels.device.logsumexp_backward import gradient_tile_kernel, projection_kernel, sample_gradient_kernel
from ltloss_kernels.row_norms import row_norms

__all__ = ["logsumexp_gradients"]

# Class tiles that are worked on together; their prototypes and a block of features stay in the second-level cache.
_GROUP = 8


def logsumexp_gradients(
    grad_loss: Tensor,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    coefficients: Tensor,
    class_factor: Tensor,
    inverse_total: Tensor | None,
    bound: Tensor,
    *,
    scale: float,
    smooth: bool,
    normalize_features: bool,
    ignore_index: int | None,
    needs: tuple[bool, bool],
    limit: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for features (N, D) and prototypes (C, D), N >= 1.

    Args:
        grad_loss: upstream gradient, a scalar or (N,) of any stride.
        features, prototypes, labels, log_prior, scale, normalize_features: as for ``logsumexp_partials``.
        coefficients: (4 or 5, N) of ``margin_loss``.
        class_factor: (C,) s·log2 e/‖w‖, of the partials.
        inverse_total: scalar that multiplies the upstream gradient, or None.
        bound: scalar, the largest |coefficient|; read for float16 only.
        smooth: whether row 3 of the coefficients is used.
        ignore_index: rows with this label may hold anything, also NaN; None: all rows count.
        needs: which of the two gradients are computed.
        limit: bytes of memory beside the gradients, see ``backward_plan``.

    Returns:
        Each gradient in the dtype of its tensor, or None where it is not needed.
    """
    run = _Backward(features, prototypes, labels, vector(log_prior), scale, normalize_features, ignore_index)
    run.take(grad_loss, coefficients, class_factor, inverse_total, bound, smooth)
    return run.gradients(*needs, limit)


class _Backward:
    """The pass; C classes are taken a slab at a time, N samples ``plan.rows`` at a time."""

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        prior: Tensor | None,
        scale: float,
        normalize: bool,
        ignore_index: int | None,
    ) -> None:
        self.features, self.prototypes, self.labels, self.prior = features, prototypes, labels, prior
        self.scale, self.ignore_index = float(scale), ignore_index
        self.dtype, self.precision = product_dtype(features.dtype, prototypes.dtype), product_precision()
        self.fold = self.dtype != torch.float32
        self.feature_copy: Literal["unit", "plain"] = "unit" if normalize else "plain"
        # Power-of-two scaled copies keep float16 in range; other dtypes have the range of float32.
        self.in_place = readable_in_place(prototypes, self.dtype) and self.dtype != torch.float16
        arch = tiles.architecture(features.device)
        self.tile, self.described = tiles.gradient_tile(arch, self.dtype, self.precision), tiles.has_copy_engine(arch)

    def take(
        self,
        upstream: Tensor,
        coefficients: Tensor,
        class_factor: Tensor,
        inverse_total: Tensor | None,
        bound: Tensor,
        smooth: bool,
    ) -> None:
        """What arrives from behind."""
        self.upstream, self.upstream_stride = upstream, upstream.stride(0) if upstream.dim() else 0
        self.coefficients, self.class_factor, self.smooth = coefficients, class_factor, smooth
        self.inverse_total = inverse_total
        scaled = self.dtype == torch.float16  # then the slab is multiplied by a power of two, see slab_scale
        self.bound = bound if scaled else None
        self.upstream_bound = (upstream.abs().amax() if upstream.dim() else upstream) if scaled else None

    def gradients(self, need_features: bool, need_prototypes: bool, limit: int) -> tuple[Tensor | None, Tensor | None]:
        """Launch everything."""
        features, prototypes = self.features, self.prototypes
        samples, (classes, width), device = features.shape[0], prototypes.shape, features.device
        wide_features = need_features and features.dtype != torch.float32
        wide_prototypes = need_prototypes and prototypes.dtype != torch.float32
        size = self.dtype.itemsize
        plan = backward_plan(
            samples,
            classes,
            per_sample=width * (size + 4 * wide_features),
            per_class=width * (size * (not self.in_place) + 4 * wide_prototypes),
            itemsize=size,
            tile_classes=self.tile.classes,
            limit=limit,
        )
        grad_features = torch.empty((samples, width), dtype=features.dtype, device=device) if need_features else None
        grad_prototypes = (
            torch.empty((classes, width), dtype=prototypes.dtype, device=device) if need_prototypes else None
        )
        feature_sum = (
            torch.empty((samples, width), dtype=torch.float32, device=device) if wide_features else grad_features
        )
        slab_sum = torch.empty((plan.classes, width), dtype=torch.float32, device=device) if wide_prototypes else None
        copy = None if self.in_place else padded_matrix(plan.classes, width, self.dtype, device)
        slab = padded_matrix(plan.rows, plan.classes, self.dtype, device)
        x, label, terms = self._prepare_samples()
        for start in range(0, classes, plan.classes):
            here = slice(start, min(start + plan.classes, classes))
            count = here.stop - here.start
            w, class_factor = self._prototype_operand(here, copy)
            prototype_sum = None
            if grad_prototypes is not None:
                prototype_sum = grad_prototypes[here] if slab_sum is None else slab_sum[:count]
            for first in range(0, samples, plan.rows):
                rows = slice(first, min(first + plan.rows, samples))
                part = slab[: rows.stop - first, :count]
                self._launch_tiles(x[rows], w, class_factor, label[rows], terms[:, rows], here, part)
                if feature_sum is not None:
                    multiply_add(feature_sum[rows], part, w, overwrite=start == 0)
                if prototype_sum is not None:
                    multiply_add(prototype_sum, part.t(), x[rows], overwrite=first == 0)
            self._project(
                feature_sum if here.stop == classes else None,
                grad_features,
                prototype_sum,
                None if grad_prototypes is None else grad_prototypes[here],
                prototypes[here],
            )
        return grad_features, grad_prototypes

    def _prepare_samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features as an operand (N, D), clean labels (N,), and the terms of dZ that belong to a sample (4, N)."""
        (samples, width), device = self.features.shape, self.features.device
        copy = padded_matrix(samples, width, self.dtype, device)
        label = torch.empty(samples, dtype=torch.int32, device=device)
        terms = torch.empty(4, samples, dtype=torch.float32, device=device)
        tile = tiles.row_tile(width)
        sample_gradient_kernel[(ceil_div(samples, tile.rows),)](
            # inputs
            self.features,
            self.labels,
            self.coefficients,
            self.upstream,
            self.inverse_total,
            self.bound,
            self.upstream_bound,
            # outputs
            copy,
            label,
            terms,
            # sizes
            samples,
            self.prototypes.shape[0],
            width,
            *self.features.stride(),
            self.labels.stride(0),
            self.coefficients.stride(0),
            self.upstream_stride,
            copy.stride(0),
            self.ignore_index,
            self.scale,
            # constants
            COPY=self.feature_copy,
            FOLD=self.fold,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )
        return copy, label, terms

    def _prototype_operand(self, here: slice, copy: Tensor | None) -> tuple[Tensor, Tensor]:
        if copy is None:
            return self.prototypes[here], self.class_factor[here]
        copy = copy[: here.stop - here.start]
        factor = torch.empty(copy.shape[0], dtype=torch.float32, device=copy.device)
        row_norms(self.prototypes[here], copy=copy, copy_factor=factor, factor_scale=self.scale * LOG2E)
        return copy, factor

    def _launch_tiles(
        self,
        features: Tensor,
        prototypes: Tensor,
        class_factor: Tensor,
        label: Tensor,
        terms: Tensor,
        here: slice,
        slab: Tensor,
    ) -> None:
        tile, (samples, classes) = self.tile, slab.shape
        class_tiles = ceil_div(classes, tile.classes)
        gradient_tile_kernel[(ceil_div(samples, tile.rows) * class_tiles,)](
            # inputs
            block_source(features, tile.rows, tile.depth, self.described),
            block_source(prototypes, tile.classes, tile.depth, self.described),
            class_factor,
            None if self.prior is None else self.prior[here],
            label,
            terms,
            # outputs
            block_source(slab, tile.rows, tile.classes, self.described),
            # sizes
            samples,
            classes,
            features.shape[1],
            here.start,
            class_tiles,
            terms.stride(0),
            features.stride(0),
            prototypes.stride(0),
            slab.stride(0),
            # constants
            DESCRIBED=self.described,
            SMOOTH=self.smooth,
            FOLD=self.fold,
            PRECISION=self.precision,
            GROUP=_GROUP,
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _project(
        self,
        feature_sum: Tensor | None,
        grad_features: Tensor | None,
        prototype_sum: Tensor | None,
        grad_prototypes: Tensor | None,
        prototypes: Tensor,
    ) -> None:
        """Finish the gradients of all features and of a slab of prototypes, whichever are given, in one launch."""
        if feature_sum is None and prototype_sum is None:
            return
        (samples, width), classes = self.features.shape, prototypes.shape[0]
        tile = tiles.row_tile(width)
        feature_blocks = 0 if feature_sum is None else ceil_div(samples, tile.rows)
        prototype_blocks = 0 if prototype_sum is None else ceil_div(classes, tile.rows)
        projection_kernel[(feature_blocks + prototype_blocks,)](
            # inputs
            feature_sum,
            prototype_sum,
            self.features,
            prototypes,
            self.labels,
            self.coefficients[4] if self.coefficients.shape[0] == 5 else None,
            self.upstream,
            self.inverse_total,
            self.bound,
            self.upstream_bound,
            # outputs
            grad_features,
            grad_prototypes,
            # sizes
            samples,
            classes,
            width,
            feature_blocks,
            width,
            *self.features.stride(),
            width,
            *prototypes.stride(),
            self.labels.stride(0),
            self.upstream_stride,
            self.ignore_index,
            self.scale,
            # constants
            FEATURE_COPY=self.feature_copy,
            PROTOTYPE_COPY="none" if self.in_place else "scaled",
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )
