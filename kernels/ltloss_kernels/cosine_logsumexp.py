"""Host side of the forward: slabs of classes, chunks of samples, and the launches that leave partial sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div, forward_plan
from ltloss_kernels.config.operands import (
    beside_each_other,
    block_source,
    padded_matrix,
    part,
    product_dtype,
    readable_in_place,
    vector,
)
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.device import elementary
from ltloss_kernels.device.logsumexp_forward import cosine_logsumexp_kernel
from ltloss_kernels.device.samples import sample_kernel
from ltloss_kernels.exponentials import Exponentials
from ltloss_kernels.launching import Launches, layout
from ltloss_kernels.row_norms import row_norms
from ltloss_kernels.running import on_device, widened

__all__ = ["LOG2E", "ForwardPass", "Partials", "fixed_shift", "logsumexp", "of_ranks", "partials"]

# exp() of a float32 overflows above 88.7 and is flushed to zero below -87.3.
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 87.0, -86.0
# Tiles hold logits in units of log 2: exp(l) = 2^(l·log2 e).
LOG2E: float = elementary.LOG2E.value


def fixed_shift(scale: float, classes: int) -> float | None:
    """A shift for which Σ exp(l - shift) neither overflows nor loses a term if |l| ≤ ``scale``; None without one."""
    shift = max(0.0, scale + math.log(classes) - _LARGEST_EXPONENT)
    return shift if -scale - shift >= _SMALLEST_EXPONENT else None


class Partials(NamedTuple):
    """Partial sums over S splits of the classes for N samples, all float32.

    With m = ``max`` of a split, or ``shift`` where that is None: Σ_{c≠y} exp(l_c) = Σ_splits sum·2^m. Partials of
    shards of the classes concatenate along S. Where their shifts differ, or only some have a ``max``, each first gets a
    ``max`` that is its shift everywhere.
    """

    sum: Tensor  # (S, N): Σ 2^(l·log2 e - m) over the other classes of each split
    max: Tensor | None  # (S, N) in units of log 2, -inf for a split without other classes; None: ``shift`` serves
    shift: float  # in units of log 2
    logit_sum: Tensor | None  # (S, N): Σ s·cos over all classes of each split, without prior, if asked for
    target_cosine: Tensor  # (N,) or (N, k); x̂·w or x·w where lengths are kept
    norm: Tensor | None  # (N,): ‖x‖, where features keep their length and prototypes do not; else None
    class_scale: Tensor  # (C,) or (C, K): s·log2 e/‖w‖, 0 for a zero row; s·log2 e where prototypes keep their length


def of_ranks(logsumexp: Tensor) -> Partials:
    """Log-sum-exps (S, N) of shards as partial sums; ``target_cosine`` and ``class_scale`` are left to be replaced."""
    maximum = logsumexp / math.log(2.0)
    return Partials(torch.ones_like(maximum), maximum, 0.0, None, maximum[0], None, maximum[0])


def logsumexp(partials: Partials) -> Tensor:
    """log Σ_{c≠y} exp(l_c), (N,) in float64; -inf where there is no other class."""
    total = partials.sum.double()
    maximum = torch.full_like(total, partials.shift) if partials.max is None else partials.max.double()
    largest = maximum.amax(0)
    base = torch.where(largest == -math.inf, 0.0, largest)
    return (base + (total * torch.exp2(maximum - base)).sum(0).log2()) * math.log(2.0)


def partials(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    log_prior: Tensor | None,
    scale: float,
    normalize_features: bool,
    normalize_prototypes: bool,
    with_logit_sum: bool,
    ignore_index: int | None,
    threshold: Tensor | None = None,
    polynomial: Tensor | None = None,
    kept: Exponentials | None = None,
) -> Partials:
    """One pass of features over prototypes: exp(l_c) with l_c = s·cos_c + log_prior_c, summed over the other classes.

    Args:
        features: (N, D); any half or float32 dtype, any strides.
        prototypes: (C, D), likewise, or float8; or (C, K, D), K sub-centres a class.
        labels: (N,) integers, or (N, k) for k targets of a sample; any strides.
        log_prior: (C,) or None, in natural units.
        scale: s > 0; the logits are s·cos, times ‖x‖ unless ``normalize_features``, and times ‖w‖ unless
            ``normalize_prototypes``.
        with_logit_sum: also sum the logits of all classes.
        ignore_index: the label of samples that do not count; the target cosine of any other label outside [0, C) is
            NaN. None: such a label has no target here, as on a shard without its class, and its cosine is 0.
        threshold, polynomial: (N,) and (3,) or None, in natural units: a logit l of another class above the threshold
            of its sample becomes p0 + p1·l + p2·l², before the prior is added.
        kept: from ``new_exponentials``; filled for ``gradients``.
    """
    if features.shape[0] == 0:
        with_norm = normalize_prototypes and not normalize_features
        return _of_no_samples(features, prototypes, labels, with_norm, with_logit_sum)
    sub_centers = prototypes.shape[1] if prototypes.dim() == 3 else 0
    with on_device(features):
        run = ForwardPass(
            widened(features),
            widened(prototypes if sub_centers == 0 else prototypes.flatten(0, -2)),
            max(1, sub_centers),
            labels,
            vector(log_prior),
            scale,
            normalize_features,
            normalize_prototypes,
            with_logit_sum,
            ignore_index,
            threshold,
            polynomial,
            kept,
        )
        for start in range(0, features.shape[0], run.plan.rows):
            chunk = run.chunk(start)
            for index in range(run.slabs):
                slab = run.slab(index)
                # Norms come with the first chunk, or with each copy, unless the tiles compute them.
                if not run.norms_in_tiles and (start == 0 or not run.in_place):
                    row_norms(
                        slab.prototypes,
                        factor=slab.factor,
                        copy=slab.copy,
                        copy_factor=slab.copy_factor,
                        factor_scale=run.factor_scale,
                        normalize=run.normalize_prototypes,
                        prior=slab.prior,
                        prior_out=slab.scaled_prior,
                        flags=run.flags if index == 0 else None,
                        launch=run.launch,
                    )
                if index == 0:
                    run.launch_samples(chunk)
                run.launch_tiles(chunk, slab)
    result = run.result
    if labels.dim() == 2:
        result = result._replace(target_cosine=result.target_cosine.t().contiguous())
    return result._replace(class_scale=result.class_scale.view(prototypes.shape[:-1])) if sub_centers else result


def _of_no_samples(
    features: Tensor, prototypes: Tensor, labels: Tensor, with_norm: bool, with_logit_sum: bool
) -> Partials:
    nothing = features.new_empty(1, 0, dtype=torch.float32)
    logit_sum, norm = nothing if with_logit_sum else None, nothing[0] if with_norm else None
    target = nothing.new_empty(labels.shape)
    return Partials(nothing, nothing, 0.0, logit_sum, target, norm, nothing.new_zeros(prototypes.shape[:-1]))


class _Chunk(NamedTuple):
    """Consecutive samples."""

    rows: slice
    copy: Tensor | None  # (n, D), of unit length or as they are; None: the features are read in place
    label: Tensor  # (k, n) int32


class _Slab(NamedTuple):
    """Consecutive classes; the last slab's vectors are padded to whole tiles."""

    first: int
    prototypes: Tensor
    factor: Tensor
    copy: Tensor | None
    copy_factor: Tensor | None
    prior: Tensor | None
    scaled_prior: Tensor | None


class ForwardPass:
    """One forward pass: chunks of ``plan.rows`` samples, each over all slabs of ``plan.classes`` classes."""

    def __init__(
        self,
        features: Tensor,
        prototypes: Tensor,
        sub_centers: int,
        labels: Tensor,
        prior: Tensor | None,
        scale: float,
        normalize: bool,
        normalize_prototypes: bool,
        with_logit_sum: bool,
        ignore_index: int | None,
        threshold: Tensor | None,
        polynomial: Tensor | None,
        kept: Exponentials | None,
    ) -> None:
        self.features, self.prototypes, self.labels, self.prior = features, prototypes, labels, prior
        self.targets = math.prod(labels.shape[1:])
        self.normalize, self.normalize_prototypes = normalize, normalize_prototypes
        self.ignore_index, self.kept = ignore_index, kept
        self.threshold, self.polynomial = vector(threshold), vector(polynomial)
        (samples, width), device = features.shape, features.device
        self.sub_centers, self.classes = sub_centers, len(prototypes) // sub_centers
        classes = self.classes
        self.dtype, self.precision = product_dtype(features.dtype, prototypes.dtype), product_precision()
        arch = tiles.architecture(device)
        tile = tiles.forward_tile(arch, self.dtype, self.precision, samples, width)
        self.tile = tiles.of_sub_centers(tile, sub_centers)
        self.described = tiles.has_copy_engine(arch)
        # Few samples: tiles read float32 prototypes in place and round them to bfloat16, which has their range.
        read_as = prototypes.dtype if self.dtype == torch.bfloat16 else self.dtype
        few = (
            threshold is None
            and sub_centers == self.targets == 1
            and tiles.norms_in_tiles(arch, self.dtype, self.precision, samples)
        )
        self.norms_in_tiles = few and normalize_prototypes and readable_in_place(prototypes, read_as)
        self.in_place = self.norms_in_tiles or readable_in_place(prototypes, self.dtype)
        if self.norms_in_tiles and read_as != self.dtype:  # as many bytes of a row at a time
            self.tile = self.tile._replace(depth=self.tile.depth // 2)
        if kept is not None:
            self.tile = tiles.keeping(arch, self.tile)
        self.row_block_stays = sub_centers == 1 and tiles.row_block_stays(arch, self.tile, width)
        self.plan = forward_plan(
            samples,
            classes,
            width * sub_centers,
            self.tile.rows,
            self.tile.classes,
            2 * tiles.multiprocessors(device),
            0 if self.in_place else self.dtype.itemsize,
            self.dtype.itemsize if normalize else 0,
        )
        self.launch = Launches(
            "partials",
            layout(features, prototypes, labels, prior, self.threshold, self.polynomial, *(kept or ())),
            (scale, normalize, normalize_prototypes, with_logit_sum, ignore_index, sub_centers),
            (self.tile, self.precision, self.plan),
        )
        self.factor_scale = scale * LOG2E
        bounded = normalize and normalize_prototypes and prior is None and threshold is None
        shift = fixed_shift(scale, classes) if bounded else None
        self.class_tiles = ceil_div(classes, self.tile.classes)
        self.slabs = ceil_div(classes, self.plan.classes)
        padded = self.class_tiles * self.tile.classes
        self._factor = self._float(padded * sub_centers)
        self._copy_factor = None if self.in_place else self._float(padded * sub_centers)
        self._scaled_prior = None if prior is None or self.norms_in_tiles else self._float(padded)
        if self._scaled_prior is not None and prior is not None and sub_centers > 1:
            self._scaled_prior[classes:] = -math.inf
            torch.mul(prior, LOG2E, out=self._scaled_prior[:classes])
        rows = min(self.plan.classes, classes) * sub_centers
        self._copy = None if self.in_place else padded_matrix(rows, width, self.dtype, device)
        self.flags = None
        if not self.norms_in_tiles:
            row_blocks = ceil_div(min(self.plan.rows, samples), self.tile.rows)
            self.flags = torch.empty(row_blocks, self.class_tiles, dtype=torch.int8, device=device)
        shape = (self.slabs * self.plan.splits, samples)
        self.result = Partials(
            sum=self._float(*shape),
            max=self._float(*shape) if shift is None else None,
            shift=(shift or 0.0) * LOG2E,
            logit_sum=self._float(*shape) if with_logit_sum else None,
            target_cosine=self._float(*labels.shape[1:], samples),
            norm=self._float(samples) if normalize_prototypes and not normalize else None,
            class_scale=self._factor[: classes * sub_centers],
        )

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.features.device)

    def chunk(self, start: int) -> _Chunk:
        """The samples from ``start`` on."""
        rows = slice(start, min(start + self.plan.rows, self.features.shape[0]))
        features = part(self.features, rows)
        (count, width), device = features.shape, features.device
        copied = self.normalize or not readable_in_place(features, self.dtype)
        # In other cases a launch of row_norms clears the flags.
        if start > 0 and self.in_place and self.flags is not None:
            self.flags.zero_()
        return _Chunk(
            rows,
            padded_matrix(count, width, self.dtype, device) if copied else None,
            torch.empty(self.targets, count, dtype=torch.int32, device=device),
        )

    def slab(self, index: int) -> _Slab:
        """Slab number ``index``; all slabs share the memory for a copy."""
        first = index * self.plan.classes
        stop = min(first + self.plan.classes, self.classes)
        here = slice(first * self.sub_centers, stop * self.sub_centers)
        padded = slice(here.start, self._factor.shape[0] if stop == self.classes else here.stop)
        several = self.sub_centers > 1  # then the prior has one entry for K rows, and was scaled before
        return _Slab(
            first,
            part(self.prototypes, here),
            part(self._factor, padded),
            part(self._copy, slice(0, here.stop - here.start)),
            part(self._copy_factor, padded),
            None if several else part(self.prior, here),
            None if several else part(self._scaled_prior, padded),
        )

    def launch_samples(self, chunk: _Chunk) -> None:
        """Write copies, norms, labels and target cosines of the samples, and flag the tiles that hold a target."""
        rows, copy, label = chunk
        features, labels, target_cosine = part(self.features, rows), part(self.labels, rows), self.result.target_cosine
        (count, width), classes, tile = features.shape, self.classes, tiles.row_tile(features.shape[1])
        self.launch(sample_kernel, (ceil_div(count, tile.rows),))(
            # inputs
            features,
            self.prototypes,
            labels,
            # outputs
            copy,
            part(self.result.norm, rows),
            part(target_cosine, rows, target_cosine.dim() - 1),
            label,
            self.flags,
            # sizes
            count,
            classes,
            width,
            self.class_tiles,
            *features.stride(),
            *self.prototypes.stride(),
            labels.stride(0),
            0 if copy is None else copy.stride(0),
            0 if labels.dim() == 1 else labels.stride(1),
            target_cosine.stride(0),
            self.ignore_index,
            # constants
            NORMALIZE_FEATURES=self.normalize,
            NORMALIZE_PROTOTYPES=self.normalize_prototypes,
            RAGGED=classes % self.tile.classes != 0,
            FLAG_ROWS=self.tile.rows,
            FLAG_CLASSES=self.tile.classes,
            SUB_CENTERS=self.sub_centers,
            TARGETS=self.targets,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )

    def launch_tiles(self, chunk: _Chunk, slab: _Slab) -> None:
        """Write the partial sums of a chunk over a slab."""
        tile, splits, partials, rows = self.tile, self.plan.splits, self.result, chunk.rows
        features = part(self.features, rows) if chunk.copy is None else chunk.copy
        prototypes = slab.prototypes if slab.copy is None else slab.copy
        kept = None if self.kept is None else self.kept.rows(rows)
        (count, width), prototypes = features.shape, beside_each_other(prototypes, self.sub_centers)
        slab_tiles = ceil_div(prototypes.shape[0], self.tile.classes)
        tf32 = self.dtype == torch.float32 and self.precision == "tf32"
        self.launch(cosine_logsumexp_kernel, (ceil_div(count, tile.rows), splits))(
            # inputs
            block_source(features, tile.rows, tile.depth, self.described, tf32),
            block_source(prototypes, tile.classes, tile.depth, self.described, tf32),
            self._factor if self._copy_factor is None else self._copy_factor,
            self.prior if self.norms_in_tiles else self._scaled_prior,
            chunk.label,
            self.flags,
            part(self.threshold, rows),
            self.polynomial,
            # outputs
            part(partials.sum, rows, 1),
            part(partials.max, rows, 1),
            part(partials.logit_sum, rows, 1),
            None if kept is None else block_source(kept.values, tile.rows, tile.classes, self.described),
            None if kept is None or partials.max is None else kept.shifts,
            # sizes
            count,
            self.classes,
            width,
            slab.first // tile.classes,
            slab_tiles,
            self.class_tiles,
            ceil_div(slab_tiles, splits),
            slab.first // self.plan.classes * splits,
            prototypes.shape[0],
            features.stride(0),
            prototypes.stride(0),
            partials.sum.stride(0),
            None if kept is None else kept.values.stride(0),
            partials.shift,
            self.factor_scale,
            # constants
            DESCRIBED=self.described,
            PRECISION=self.precision,
            NORMS=self.norms_in_tiles,
            RESIDENT=self.row_block_stays,
            SUB_CENTERS=self.sub_centers,
            TARGETS=self.targets,
            **tile.constants,
        )
