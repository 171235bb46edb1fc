"""The forward on the host: slabs of prototypes, chunks of samples, and the launches that leave partial sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div, forward_plan
from ltloss_kernels.config.operands import block_source, padded_matrix, product_dtype, readable_in_place, vector
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.device import elementary
from ltloss_kernels.device.logsumexp_forward import cosine_logsumexp_kernel, sample_kernel
from ltloss_kernels.row_norms import row_norms

__all__ = ["LOG2E", "Partials", "fixed_shift", "logsumexp_partials"]

# exp() of a float32 overflows above 88.7 and is flushed to zero below -87.3.
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 87.0, -86.0
# Logits are counted in units of log 2 throughout the tiles.
LOG2E: float = elementary.LOG2E.value


def fixed_shift(scale: float, classes: int) -> float | None:
    """A shift with which Σ exp(l - shift) neither overflows nor loses a term, for |l| ≤ ``scale``; None if none has."""
    shift = max(0.0, scale + math.log(classes) - _LARGEST_EXPONENT)
    return shift if -scale - shift >= _SMALLEST_EXPONENT else None


class Partials(NamedTuple):
    """What one pass over the prototypes leaves of N samples: sums over S parts of the classes, all float32.

    With m the maximum of a part, or the shift: Σ_{c≠y} exp(l_c) = Σ_S sum·2^m. Those of several shards of the classes
    concatenate along S. Where their shifts differ, or only some have a maximum, a maximum that is everywhere the shift
    replaces it first.
    """

    sum: Tensor  # (S, N): Σ 2^(l·log2 e - m) over the other classes of each part
    max: Tensor | None  # (S, N) in units of log 2, -inf for a part without other classes; None: the shift serves
    shift: float  # in units of log 2
    logit_sum: Tensor | None  # (S, N): Σ s·cos over all classes of each part, if asked for
    target_cosine: Tensor  # (N,)
    norm: Tensor | None  # (N,): ‖x‖, where features keep their length
    class_factor: Tensor  # (C,): s·log2 e/‖w‖, for the backward; 0 for a zero row


def logsumexp_partials(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    *,
    scale: float,
    normalize_features: bool,
    with_logit_sum: bool,
    ignore_index: int | None,
) -> Partials:
    """One pass of features over prototypes: l_c = s·cos_c + log_prior_c, summed over all classes but the target.

    Args:
        features: (N, D), N >= 1; any half or float32 dtype, any strides.
        prototypes: (C, D), likewise.
        labels: (N,) integers, any strides.
        log_prior: (C,) or None, in natural units.
        scale: s > 0; the logits are s·cos, times ‖x‖ unless ``normalize_features``.
        with_logit_sum: also sum the logits of all classes.
        ignore_index: the label of samples that do not count; the target cosine of any other label outside [0, C) is
            NaN. With None such a label means that there is no target here, and its cosine is 0.
    """
    run = _Forward(features, prototypes, labels, vector(log_prior), scale, normalize_features, with_logit_sum)
    return run.partials(ignore_index)


class _Forward:
    """The pass; N samples are taken ``plan.rows`` at a time, each chunk over all slabs of ``plan.classes``."""

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        prior: Tensor | None,
        scale: float,
        normalize: bool,
        with_logit_sum: bool,
    ) -> None:
        self.features, self.prototypes, self.labels, self.prior = features, prototypes, labels, prior
        self.normalize = normalize
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
        self.factor_scale = scale * LOG2E
        shift = fixed_shift(scale, classes) if normalize and prior is None else None
        self.class_tiles = ceil_div(classes, self.tile.classes)
        self.slabs = ceil_div(classes, self.plan.classes)
        padded = self.class_tiles * self.tile.classes
        self._factor = self._float(padded)
        self._copy_factor = None if self.in_place else self._float(padded)
        self._scaled_prior = None if prior is None else self._float(padded)
        self._copy = (
            None if self.in_place else padded_matrix(min(self.plan.classes, classes), width, self.dtype, device)
        )
        shape = (self.slabs * self.plan.splits, samples)
        self.result = Partials(
            sum=self._float(*shape),
            max=self._float(*shape) if shift is None else None,
            shift=(shift or 0.0) * LOG2E,
            logit_sum=self._float(*shape) if with_logit_sum else None,
            target_cosine=self._float(samples),
            norm=None if normalize else self._float(samples),
            class_factor=self._factor[:classes],
        )

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.features.device)

    def partials(self, ignore_index: int | None) -> Partials:
        """Launch everything."""
        samples = self.features.shape[0]
        row_blocks = ceil_div(min(self.plan.rows, samples), self.tile.rows)
        flags = torch.empty(row_blocks, self.class_tiles, dtype=torch.int8, device=self.features.device)
        for start in range(0, samples, self.plan.rows):
            self._chunk(slice(start, min(start + self.plan.rows, samples)), ignore_index, flags)
        return self.result

    def _chunk(self, rows: slice, ignore_index: int | None, flags: Tensor) -> None:
        features = self.features[rows]
        copied = self.normalize or not readable_in_place(features, self.dtype)
        (count, width), device = features.shape, features.device
        operand = padded_matrix(count, width, self.dtype, device) if copied else features
        label = torch.empty(count, dtype=torch.int32, device=device)
        if rows.start > 0 and self.in_place:  # otherwise a launch of row_norms clears them on its way
            flags.zero_()
        for slab in range(self.slabs):
            prototypes = self._prepared_slab(slab, rows.start, flags)
            if slab == 0:
                self._prepare_samples(rows, operand if copied else None, label, ignore_index, flags)
            self._launch_tiles(rows, operand, prototypes, label, slab, flags)

    def _prepared_slab(self, slab: int, first_row: int, flags: Tensor) -> Tensor:
        """The slab's prototypes as an operand; their norms are computed with the first chunk, or with each copy."""
        classes = self.prototypes.shape[0]
        start = slab * self.plan.classes
        stop = min(start + self.plan.classes, classes)
        prototypes = self.prototypes[start:stop]
        if self.in_place and first_row > 0:
            return prototypes
        padded = slice(start, self._factor.shape[0] if stop == classes else stop)
        copy = None if self._copy is None else self._copy[: stop - start]
        row_norms(
            prototypes,
            factor=self._factor[padded],
            copy=copy,
            copy_factor=None if self._copy_factor is None else self._copy_factor[padded],
            factor_scale=self.factor_scale,
            prior=None if self.prior is None else self.prior[start:stop],
            prior_out=None if self._scaled_prior is None else self._scaled_prior[padded],
            flags=flags if slab == 0 else None,
        )
        return prototypes if copy is None else copy

    def _prepare_samples(
        self, rows: slice, copy: Tensor | None, label: Tensor, ignore_index: int | None, flags: Tensor
    ) -> None:
        features, labels, norm = self.features[rows], self.labels[rows], self.result.norm
        (count, width), classes, tile = features.shape, self.prototypes.shape[0], tiles.row_tile(features.shape[1])
        sample_kernel[(ceil_div(count, tile.rows),)](
            # inputs
            features,
            self.prototypes,
            labels,
            # outputs
            copy,
            None if norm is None else norm[rows],
            self.result.target_cosine[rows],
            label,
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
            ignore_index,
            # constants
            RAGGED=classes % self.tile.classes != 0,
            FLAG_ROWS=self.tile.rows,
            FLAG_CLASSES=self.tile.classes,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )

    def _launch_tiles(
        self, rows: slice, features: Tensor, prototypes: Tensor, label: Tensor, slab: int, flags: Tensor
    ) -> None:
        tile, splits, partials = self.tile, self.plan.splits, self.result
        (count, width), slab_tiles = features.shape, ceil_div(prototypes.shape[0], self.tile.classes)
        cosine_logsumexp_kernel[(ceil_div(count, tile.rows), splits)](
            # inputs
            block_source(features, tile.rows, tile.depth, self.described),
            block_source(prototypes, tile.classes, tile.depth, self.described),
            self._factor if self._copy_factor is None else self._copy_factor,
            self._scaled_prior,
            label,
            flags,
            # outputs
            partials.sum[:, rows],
            None if partials.max is None else partials.max[:, rows],
            None if partials.logit_sum is None else partials.logit_sum[:, rows],
            # sizes
            count,
            self.prototypes.shape[0],
            width,
            slab * self.plan.classes // tile.classes,
            slab_tiles,
            self.class_tiles,
            ceil_div(slab_tiles, splits),
            slab * splits,
            prototypes.shape[0],
            features.stride(0),
            prototypes.stride(0),
            partials.sum.stride(0),
            partials.shift,
            # constants
            DESCRIBED=self.described,
            PRECISION=self.precision,
            BLOCK_ROWS=tile.rows,
            BLOCK_CLASSES=tile.classes,
            BLOCK_DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
