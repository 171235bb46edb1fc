"""The backward on the host: a slab of dZ at a time, two library products on it, and the projections."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import backward_plan
from ltloss_kernels.config.operands import (
    block_source,
    multiply_add,
    padded_matrix,
    product_dtype,
    readable_in_place,
)
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.device.logsumexp_backward import gradient_tile_kernel, projection_kernel, sample_gradient_kernel
from ltloss_kernels.device.rows import row_norms
from ltloss_kernels.forward_pass import LOG2E

__all__ = ["BackwardPass", "Upstream"]

# Class tiles that are worked on together; their prototypes and a block of features stay in the second-level cache.
_GROUP = 8


class Upstream(NamedTuple):
    """What arrives from behind: coefficients of each sample, and the gradient of the loss."""

    coefficients: Tensor  # (4 or 5, N), see margin_cross_entropy_kernel
    gradient: Tensor  # scalar or (N,)
    inverse_total: Tensor | None  # scalar that multiplies the gradient
    bound: Tensor  # scalar: the largest |coefficient|; read for float16 only
    every_class: bool  # whether row 3 of the coefficients is used


class BackwardPass:
    """Gradients of features (N, D) and prototypes (C, D), N >= 1.

    Args:
        features, prototypes, labels, prior, scale, normalize: as for the forward.
        ignore_index: rows with this label may hold anything, also NaN; None: all rows count.
        class_factor: (C,) s·log2 e/‖w‖, from the forward; used where the prototypes are read in place.
        upstream: see :class:`Upstream`.
        limit: bytes of memory beside the gradients, see ``backward_plan``.
    """

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        prior: Tensor | None,
        class_factor: Tensor,
        upstream: Upstream,
        *,
        scale: float,
        normalize: bool,
        ignore_index: int | None,
        limit: int,
    ) -> None:
        self.features, self.prototypes, self.labels, self.prior = features, prototypes, labels, prior
        self.class_factor, self.upstream = class_factor, upstream
        self.scale, self.normalize, self.ignore_index, self.limit = scale, normalize, ignore_index, limit
        self.dtype, self.precision = product_dtype(features.dtype, prototypes.dtype), product_precision()
        self.scaled, self.fold = self.dtype == torch.float16, self.dtype != torch.float32
        self.feature_copy: Literal["unit", "plain"] = "unit" if normalize else "plain"
        # Power-of-two scaled copies keep float16 in range; other dtypes have the range of float32.
        self.in_place = readable_in_place(prototypes, self.dtype) and not self.scaled
        arch = tiles.architecture(features.device)
        self.tile, self.described = tiles.gradient_tile(arch, self.dtype, self.precision), tiles.has_copy_engine(arch)
        gradient = upstream.gradient
        self.upstream_bound = gradient.abs().amax() if self.scaled and gradient.dim() else gradient
        self.upstream_stride = gradient.stride(0) if gradient.dim() else 0

    def gradients(self, need_features: bool, need_prototypes: bool) -> tuple[Tensor | None, Tensor | None]:
        """Each gradient in the dtype of its tensor, or None where it is not needed."""
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
            limit=self.limit,
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
        operand, label, terms = self._prepare_samples()
        for start in range(0, classes, plan.classes):
            here = slice(start, min(start + plan.classes, classes))
            count = here.stop - here.start
            weights, class_factor = self._prototype_operand(here, copy)
            prototype_sum = None
            if grad_prototypes is not None:
                prototype_sum = grad_prototypes[here] if slab_sum is None else slab_sum[:count]
            for first in range(0, samples, plan.rows):
                rows = slice(first, min(first + plan.rows, samples))
                part = slab[: rows.stop - first, :count]
                self._launch_tiles(operand[rows], weights, class_factor, label[rows], terms[:, rows], here, part)
                if feature_sum is not None:
                    multiply_add(feature_sum[rows], part, weights, overwrite=start == 0)
                if prototype_sum is not None:
                    multiply_add(prototype_sum, part.t(), operand[rows], overwrite=first == 0)
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
        (samples, width), device, upstream = self.features.shape, self.features.device, self.upstream
        copy = padded_matrix(samples, width, self.dtype, device)
        label = torch.empty(samples, dtype=torch.int32, device=device)
        terms = torch.empty(4, samples, dtype=torch.float32, device=device)
        tile = tiles.row_tile(width)
        sample_gradient_kernel[(triton.cdiv(samples, tile.rows),)](
            # inputs
            self.features,
            self.labels,
            upstream.coefficients,
            upstream.gradient,
            upstream.inverse_total,
            upstream.bound,
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
            upstream.coefficients.stride(0),
            self.upstream_stride,
            copy.stride(0),
            self.ignore_index or 0,
            self.scale,
            # constants
            COPY=self.feature_copy,
            SUPERVISED=self.ignore_index is not None,
            HAS_TOTAL=upstream.inverse_total is not None,
            SCALED=self.scaled,
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
        inverse_norm = torch.empty_like(factor)
        row_norms(self.prototypes[here], inverse_norm, factor=factor, factor_scale=self.scale * LOG2E, copy=copy)
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
        class_tiles = triton.cdiv(classes, tile.classes)
        gradient_tile_kernel[(triton.cdiv(samples, tile.rows) * class_tiles,)](
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
            HAS_PRIOR=self.prior is not None,
            SMOOTH=self.upstream.every_class,
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
        upstream, (samples, width), classes = self.upstream, self.features.shape, prototypes.shape[0]
        tile = tiles.row_tile(width)
        feature_blocks = 0 if feature_sum is None else triton.cdiv(samples, tile.rows)
        prototype_blocks = 0 if prototype_sum is None else triton.cdiv(classes, tile.rows)
        projection_kernel[(feature_blocks + prototype_blocks,)](
            # inputs
            feature_sum,
            prototype_sum,
            self.features,
            prototypes,
            self.labels,
            upstream.coefficients,
            upstream.gradient,
            upstream.inverse_total,
            upstream.bound,
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
            upstream.coefficients.stride(0),
            self.upstream_stride,
            self.ignore_index or 0,
            self.scale,
            # constants
            FEATURES=feature_sum is not None,
            PROTOTYPES=prototype_sum is not None,
            HAS_LABELS=self.ignore_index is not None,
            HAS_TOTAL=upstream.inverse_total is not None,
            FEATURE_COPY=self.feature_copy,
            PROTOTYPE_COPY="none" if self.in_place else "scaled",
            LENGTH=upstream.coefficients.shape[0] == 5,
            SCALED=self.scaled,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )
