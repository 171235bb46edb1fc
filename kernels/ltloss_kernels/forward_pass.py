"""The forward on the host: slabs of prototypes, chunks of samples, and the launches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import forward_plan
from ltloss_kernels.config.operands import (
    block_source,
    padded_matrix,
    product_dtype,
    readable_in_place,
)
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.device import elementary as arithmetic
from ltloss_kernels.device.logsumexp_forward import combine_kernel, cosine_logsumexp_kernel, sample_kernel
from ltloss_kernels.device.margin_loss import margin_cross_entropy_kernel, reduce_kernel
from ltloss_kernels.device.rows import row_norms

__all__ = ["LOG2E", "ForwardPass", "Margin", "SampleSums", "fixed_shift"]

# exp() of a float32 overflows above 88.7 and is flushed to zero below -87.3.
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 87.0, -86.0
# Logits are counted in units of log 2 throughout the tiles.
LOG2E: float = arithmetic.LOG2E.value


def fixed_shift(scale: float, classes: int) -> float | None:
    """A shift with which Σ exp(l - shift) neither overflows nor loses a term, for |l| ≤ ``scale``; None if none has."""
    shift = max(0.0, scale + math.log(classes) - _LARGEST_EXPONENT)
    return shift if -scale - shift >= _SMALLEST_EXPONENT else None


class Margin(NamedTuple):
    """Everything that tells one loss from another; see ``margin_cross_entropy_kernel``. Vectors are (C,) float32."""

    angular_vector: Tensor | None
    angular: float
    cosine_vector: Tensor | None
    cosine: float
    weight_vector: Tensor | None
    weight: float
    prior_sum: Tensor | None
    angle_multiplier: float
    label_smoothing: float
    arcface_beyond_pi: bool
    exact_gradient: bool


class SampleSums(NamedTuple):
    """What the pass leaves of a chunk of samples, before the splits are added."""

    rows: slice
    partial_sum: Tensor  # (splits, n)
    partial_max: Tensor | None
    partial_logit: Tensor | None
    own_cosine: Tensor  # (n,)
    length: Tensor | None
    label: Tensor  # (n,) int32: the class, -1 ignored, -2 not a class


class ForwardPass:
    """One pass of features (N, D) over prototypes (C, D), a chunk of samples at a time.

    Args:
        features, prototypes: any half or float32 dtype, any strides, N >= 1.
        labels: (N,) integers.
        prior: (C,) float32, contiguous, or None.
        scale, normalize: logits are scale·cos, times ‖x‖ unless ``normalize``.
        with_logit_sum: also sum the logits of all classes.
        ignore_index: the label of samples that do not count; None takes every label outside [0, C) for "no own class".
    """

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        prior: Tensor | None,
        *,
        scale: float,
        normalize: bool,
        with_logit_sum: bool,
        ignore_index: int | None,
    ) -> None:
        self.features, self.prototypes, self.labels, self.prior = features, prototypes, labels, prior
        self.scale, self.normalize, self.with_logit_sum = scale, normalize, with_logit_sum
        self.ignore_index = ignore_index
        samples, (classes, width), device = features.shape[0], prototypes.shape, features.device
        self.dtype, self.precision = product_dtype(features.dtype, prototypes.dtype), product_precision()
        arch = tiles.architecture(device)
        self.tile, self.described = tiles.forward_tile(arch, self.dtype, self.precision), tiles.has_copy_engine(arch)
        self.in_place = readable_in_place(prototypes, self.dtype)
        self.plan = forward_plan(
            samples,
            classes,
            width,
            self.tile.rows,
            self.tile.classes,
            2 * tiles.multiprocessors(device),
            0 if self.in_place else self.dtype.itemsize,
            self.dtype.itemsize if normalize else 0,
        )
        shift = fixed_shift(scale, classes) if normalize and prior is None else None
        self.online, self.shift = shift is None, (shift or 0.0) * LOG2E
        self.class_tiles = triton.cdiv(classes, self.tile.classes)
        self.slabs = triton.cdiv(classes, self.plan.classes)
        self.splits = self.slabs * self.plan.splits
        padded = self.class_tiles * self.tile.classes
        self._inverse_norm, self._class_factor = self._float(padded), self._float(padded)
        self._scaled_prior = None if prior is None else self._float(padded)
        self._copy = (
            None if self.in_place else padded_matrix(min(self.plan.classes, classes), width, self.dtype, device)
        )
        self.feature_inverse_norm = self._float(samples)

    @property
    def prototype_inverse_norm(self) -> Tensor:
        """1/‖w‖ (C,), complete after the pass."""
        return self._inverse_norm[: self.prototypes.shape[0]]

    @property
    def class_factor(self) -> Tensor:
        """s·log2 e/‖w‖ (C,) of the prototypes as they went into the product, complete after the pass."""
        return self._class_factor[: self.prototypes.shape[0]]

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.features.device)

    def chunks(self) -> Iterator[SampleSums]:
        """Run the pass; yield each chunk of samples when its kernels are launched."""
        samples = self.features.shape[0]
        row_blocks = triton.cdiv(min(self.plan.rows, samples), self.tile.rows)
        flags = torch.empty(row_blocks, self.class_tiles, dtype=torch.int8, device=self.features.device)
        for start in range(0, samples, self.plan.rows):
            yield self._chunk(slice(start, min(start + self.plan.rows, samples)), flags)

    def _chunk(self, rows: slice, flags: Tensor) -> SampleSums:
        count = rows.stop - rows.start
        features = self.features[rows]
        copied = self.normalize or not readable_in_place(features, self.dtype)
        operand = padded_matrix(count, features.shape[1], self.dtype, features.device) if copied else features
        sums = SampleSums(
            rows,
            self._float(self.splits, count),
            self._float(self.splits, count) if self.online else None,
            self._float(self.splits, count) if self.with_logit_sum else None,
            self._float(count),
            None if self.normalize else self._float(count),
            torch.empty(count, dtype=torch.int32, device=features.device),
        )
        if rows.start > 0 and self.in_place:  # otherwise a launch of row_norms clears them on its way
            flags.zero_()
        for slab in range(self.slabs):
            prototypes = self._prepared_slab(slab, rows.start, flags)
            if slab == 0:
                self._prepare_samples(features, operand if copied else None, sums, flags)
            self._launch_tiles(operand, prototypes, slab, sums, flags)
        return sums

    def _prepared_slab(self, slab: int, first_row: int, flags: Tensor) -> Tensor:
        """The slab's prototypes as an operand; their norms are computed with the first chunk, or with each copy."""
        classes = self.prototypes.shape[0]
        start = slab * self.plan.classes
        stop = min(start + self.plan.classes, classes)
        prototypes = self.prototypes[start:stop]
        if self.in_place and first_row > 0:
            return prototypes
        padded = slice(start, self._inverse_norm.shape[0] if stop == classes else stop)
        copy = None if self._copy is None else self._copy[: stop - start]
        row_norms(
            prototypes,
            self._inverse_norm[padded],
            factor=self._class_factor[padded],
            factor_scale=self.scale * LOG2E,
            copy=copy,
            prior=None if self.prior is None else self.prior[start:stop],
            prior_out=None if self._scaled_prior is None else self._scaled_prior[padded],
            flags=flags if slab == 0 else None,
        )
        return prototypes if copy is None else copy

    def _prepare_samples(self, features: Tensor, copy: Tensor | None, sums: SampleSums, flags: Tensor) -> None:
        rows, tile = sums.rows, tiles.row_tile(features.shape[1])
        labels, (count, width), classes = self.labels[rows], features.shape, self.prototypes.shape[0]
        sample_kernel[(triton.cdiv(count, tile.rows),)](
            # inputs
            features,
            self.prototypes,
            labels,
            # outputs
            copy,
            self.feature_inverse_norm[rows],
            sums.length,
            sums.own_cosine,
            sums.label,
            flags,
            # sizes
            count,
            classes,
            width,
            self.class_tiles,
            *features.stride(),
            *self.prototypes.stride(),
            labels.stride(0),
            0 if copy is None else copy.stride(0),
            0 if self.ignore_index is None else self.ignore_index,
            # constants
            SUPERVISED=self.ignore_index is not None,
            NORMALIZE=self.normalize,
            HAS_COPY=copy is not None,
            RAGGED=classes % self.tile.classes != 0,
            FLAG_ROWS=self.tile.rows,
            FLAG_CLASSES=self.tile.classes,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )

    def _launch_tiles(self, features: Tensor, prototypes: Tensor, slab: int, sums: SampleSums, flags: Tensor) -> None:
        tile, splits = self.tile, self.plan.splits
        (count, width), slab_tiles = features.shape, triton.cdiv(prototypes.shape[0], self.tile.classes)
        cosine_logsumexp_kernel[(triton.cdiv(count, tile.rows), splits)](
            # inputs
            block_source(features, tile.rows, tile.depth, self.described),
            block_source(prototypes, tile.classes, tile.depth, self.described),
            self._class_factor,
            self._scaled_prior,
            sums.label,
            flags,
            # outputs
            sums.partial_sum,
            sums.partial_max,
            sums.partial_logit,
            # sizes
            count,
            self.prototypes.shape[0],
            width,
            slab * self.plan.classes // tile.classes,
            slab_tiles,
            self.class_tiles,
            triton.cdiv(slab_tiles, splits),
            slab * splits,
            prototypes.shape[0],
            features.stride(0),
            prototypes.stride(0),
            self.shift,
            # constants
            DESCRIBED=self.described,
            ONLINE=self.online,
            HAS_PRIOR=self.prior is not None,
            WITH_LOGIT_SUM=self.with_logit_sum,
            PRECISION=self.precision,
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def combine(self, sums: SampleSums, other_logsumexp: Tensor, own_logit: Tensor, logit_sum: Tensor) -> None:
        """r, t and Σ_c s·cos_c of a chunk, written to their rows of (N,) vectors (``logit_sum`` only if asked for)."""
        rows = sums.rows
        count = rows.stop - rows.start
        combine_kernel[(triton.cdiv(count, tiles.SAMPLE_ROWS),)](
            # inputs
            sums.partial_sum,
            sums.partial_max,
            sums.partial_logit,
            sums.own_cosine,
            sums.length,
            # outputs
            other_logsumexp[rows],
            own_logit[rows],
            logit_sum[rows] if self.with_logit_sum else None,
            # sizes
            count,
            self.splits,
            self.shift,
            self.scale,
            # constants
            ONLINE=self.online,
            NORMALIZE=self.normalize,
            WITH_LOGIT_SUM=self.with_logit_sum,
            ROWS=tiles.SAMPLE_ROWS,
        )

    def blocks(self, samples: int) -> int:
        """How many programs work on the N-vectors of all chunks together."""
        chunks, rest = divmod(samples, self.plan.rows)
        return int(chunks * triton.cdiv(self.plan.rows, tiles.SAMPLE_ROWS) + triton.cdiv(rest, tiles.SAMPLE_ROWS))

    def losses(self, sums: SampleSums, margin: Margin, loss: Tensor, coefficients: Tensor, block_sums: Tensor) -> None:
        """Weighted losses and coefficients of a chunk: its part of (N,), (4 or 5, N) and (3, blocks)."""
        rows = sums.rows
        count = rows.stop - rows.start
        has_angle = margin.angle_multiplier != 1.0 or margin.angular != 0.0 or margin.angular_vector is not None
        margin_cross_entropy_kernel[(triton.cdiv(count, tiles.SAMPLE_ROWS),)](
            # inputs
            sums.partial_sum,
            sums.partial_max,
            sums.partial_logit,
            sums.own_cosine,
            sums.length,
            sums.label,
            margin.angular_vector,
            margin.cosine_vector,
            self.prior,
            margin.prior_sum,
            margin.weight_vector,
            # outputs
            loss[rows],
            coefficients[:, rows],
            block_sums,
            # sizes
            count,
            self.prototypes.shape[0],
            self.splits,
            coefficients.stride(0),
            block_sums.shape[1],
            self.blocks(rows.start),
            self.shift,
            self.scale,
            margin.angular,
            margin.cosine,
            margin.weight,
            margin.angle_multiplier,
            margin.label_smoothing,
            # constants
            ONLINE=self.online,
            NORMALIZE=self.normalize,
            HAS_ANGLE=has_angle,
            ARCFACE=margin.arcface_beyond_pi,
            EXACT_GRADIENT=margin.exact_gradient,
            HAS_ANGULAR_VECTOR=margin.angular_vector is not None,
            HAS_COSINE_VECTOR=margin.cosine_vector is not None,
            HAS_PRIOR=self.prior is not None,
            HAS_WEIGHT=margin.weight_vector is not None,
            SMOOTH=margin.label_smoothing > 0.0,
            ROWS=tiles.SAMPLE_ROWS,
        )


def reduce_losses(block_sums: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """From (3, blocks): the loss, 1/Σ weights (1 unless ``mean``) and the largest coefficient, three scalars."""
    loss, inverse_total, bound = (block_sums.new_empty(()) for _ in range(3))
    reduce_kernel[(1,)](
        # inputs
        block_sums,
        # outputs
        loss,
        inverse_total,
        bound,
        # sizes
        block_sums.shape[1],
        # constants
        MEAN=mean,
        BLOCK=1024,
    )
    return loss, inverse_total, bound
