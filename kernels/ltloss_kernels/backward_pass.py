"""Memory and launches of a backward pass: a slab of dZ at a time, its tiles, and the projections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ltloss_kernels.config import choices
from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import backward_plan, ceil_div, in_waves, slab_columns
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
from ltloss_kernels.cosine_logsumexp import LOG2E, fixed_shift
from ltloss_kernels.device.logsumexp_backward import gradient_tile_kernel, sample_gradient_kernel
from ltloss_kernels.device.projection import projection_kernel, prototype_gradient_kernel
from ltloss_kernels.exponentials import Exponentials
from ltloss_kernels.launching import Launches, layout
from ltloss_kernels.prototype_update import NO_UPDATE, PrototypeUpdate, Updating

__all__ = ["BackwardPass", "Slab"]

# Class tiles of a group of programs: their prototypes and a block of features stay in the second-level cache.
_GROUP = 8


class Slab(NamedTuple):
    """Consecutive classes; there is memory for the dZ of one slab."""

    first: int
    prototypes: Tensor
    operand: Tensor  # of the products: the prototypes, or memory for their copy
    factor: Tensor  # s·log2 e over the length of the operand's rows
    copy_factor: Tensor | None  # ``factor``, if the copy has yet to be made
    sum: Tensor | None  # the gradient in float32, before the projection
    grad: Tensor | None  # the gradient; the kept prototypes themselves, where an update moves them


class BackwardPass:
    """One backward pass: a slab of classes at a time, and of it ``plan.rows`` samples at a time."""

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
        ignore_index: int | None,
        threshold: Tensor | None,
        polynomial: Tensor | None,
    ) -> None:
        self.normalize_prototypes = normalize_prototypes
        self.sub_centers, self.classes = sub_centers, len(prototypes) // sub_centers
        self.targets, self.with_norm = math.prod(labels.shape[1:]), normalize_prototypes and not normalize
        self.features, self.prototypes, self.prior = features, prototypes, prior
        self.labels, self.ignore_index = labels, ignore_index
        self.scale, self.threshold, self.polynomial = float(scale), vector(threshold), vector(polynomial)
        self.dtype, self.precision = product_dtype(features.dtype, prototypes.dtype), product_precision()
        self.fold, self.feature_copy = self.dtype != torch.float32, "unit" if normalize else "plain"
        # Power-of-two scaled copies keep float16 in range; other dtypes have the range of float32.
        self.in_place = readable_in_place(prototypes, self.dtype) and self.dtype != torch.float16
        self.arch = tiles.architecture(features.device)
        tile = tiles.gradient_tile(self.arch, self.dtype, self.precision, *features.shape)
        self.tile, self.described = tiles.of_sub_centers(tile, sub_centers), tiles.has_copy_engine(self.arch)
        self.kept: Exponentials | None = None
        self.kept_shift: float | None = None

    def take(
        self,
        upstream: Tensor,
        coefficients: Tensor,
        class_scale: Tensor,
        inverse_weight_sum: Tensor | None,
        max_coefficient: Tensor,
        smooth: bool,
    ) -> None:
        """Keep the upstream gradient, and what the forward left of each sample."""
        self.upstream, self.upstream_stride = upstream, upstream.stride(0) if upstream.dim() else 0
        self.coefficients, self.class_scale, self.smooth = coefficients, class_scale, smooth
        self.inverse_weight_sum = inverse_weight_sum
        float16_slab = self.dtype == torch.float16  # then dZ is multiplied by a power of two, see slab_scale
        if float16_slab and not self.normalize_prototypes:  # s/‖w̃‖ may be as much as s times the largest entry
            largest = torch.linalg.vector_norm(self.prototypes, torch.inf, dtype=torch.float32)
            max_coefficient = max_coefficient * largest.clamp_min(1.0)
        if float16_slab and self.polynomial is not None:  # whose slope at a logit may be more than 1
            _, p1, p2 = self.polynomial.abs()
            max_coefficient = max_coefficient * (p1 + 2.0 * self.scale * p2).clamp_min(1.0)
        self.max_coefficient = max_coefficient if float16_slab else None
        self.max_upstream = (upstream.abs().amax() if upstream.dim() else upstream) if float16_slab else None

    def take_kept(self, kept: Exponentials) -> None:
        """Make dZ from these exponentials. No tile may span two tiles of the forward: their shifts differ."""
        self.kept, self.fold = kept, False
        if self.feature_copy == "unit" and self.normalize_prototypes and self.prior is None:
            shift = fixed_shift(self.scale, self.prototypes.shape[0])
            self.kept_shift = None if shift is None else shift * LOG2E
        self.tile = tiles.of_kept(self.tile, self.dtype)
        if self.kept_shift is None and len(kept.shifts) > 1:
            self.tile = self.tile._replace(classes=min(self.tile.classes, kept.tile_classes))

    def allocate(
        self,
        need_features: bool,
        need_prototypes: bool,
        need_prior: bool,
        limit: int,
        by_slab: bool = False,
        update: PrototypeUpdate | None = None,
    ) -> None:
        """Allocate the gradients, and everything else within ``limit`` bytes beside them.

        ``by_slab``: the prototypes' gradient is float32 and has memory for one slab, which counts towards ``limit``.
        ``update``: the prototypes' gradient has no memory, because it goes straight into the prototypes.
        """
        self.tile = tiles.summing(self.arch, self.tile, need_prior, self.polynomial is not None)
        self.projecting_tile = self._tile_for_prototypes(update)
        need_prototypes |= by_slab or update is not None
        gradient_dtype = torch.float32 if by_slab else self.prototypes.dtype
        features, classes, several = self.features, self.classes, self.sub_centers
        (samples, width), device = features.shape, features.device
        wide_features = need_features and features.dtype != torch.float32
        projecting = need_prototypes and self.projecting_tile is not None
        wide_prototypes = need_prototypes and (update is not None or gradient_dtype != torch.float32) and not projecting
        size, blocks = self.dtype.itemsize, ceil_div(samples, self.tile.rows)
        self.plan = backward_plan(
            samples,
            classes,
            per_sample=width * (size + 4 * wide_features),
            per_class=several * width * (size * (not self.in_place) + 4 * (wide_prototypes or by_slab))
            + 4 * blocks * (projecting + need_prior),
            itemsize=several * size,
            tile_classes=self.tile.classes,
            limit=limit,
            reread=several * width * (size + 4 * (need_prototypes and not projecting)),
            cache=tiles.cache_bytes(device) if choices.tried("slabs of the cache") else 0,
        )
        if choices.tried("one wave"):
            wave = in_waves(self.plan.classes, width, tiles.multiprocessors(device))
            self.plan = self.plan._replace(classes=wave)

        def matrix(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((rows, width), dtype=dtype, device=device)

        self.grad_features = matrix(samples, features.dtype) if need_features else None
        self.by_slab, self.grad_prototypes = by_slab, None if update is None else update.weight
        if need_prototypes and update is None:
            self.grad_prototypes = matrix(several * (self.plan.classes if by_slab else classes), gradient_dtype)
        self.feature_sum = matrix(samples, torch.float32) if wide_features else self.grad_features
        self._slab_sum = matrix(several * self.plan.classes, torch.float32) if wide_prototypes else None
        self.along = torch.empty(blocks, self.plan.classes, device=device) if projecting else None
        self.through_r = torch.zeros(classes, device=device) if need_prior else None
        self._sums = torch.empty(blocks * self.plan.classes, device=device) if need_prior else None
        self._sums_factor = torch.empty((), device=device) if need_prior else None
        self._copy = None if self.in_place else padded_matrix(several * self.plan.classes, width, self.dtype, device)
        columns = several * slab_columns(self.plan.classes, self.tile.classes, several)
        self._slab = padded_matrix(self.plan.rows, columns, self.dtype, device)
        self.unit = padded_matrix(samples, width, self.dtype, device)
        self._label = torch.empty(self.targets, samples, dtype=torch.int32, device=device)
        self._sample_gradients = torch.empty(3 + self.targets, samples, dtype=torch.float32, device=device)
        self.launch = Launches(
            "gradients",
            layout(features, self.prototypes, self.labels, self.prior, self.threshold, self.coefficients),
            layout(self.class_scale, self.upstream, self.inverse_weight_sum, self.max_coefficient, self.max_upstream),
            layout(self.polynomial, *(self.kept or ())),
            (self.feature_copy, self.normalize_prototypes, self.smooth, self.ignore_index, several),
            (need_features, need_prototypes, need_prior, by_slab, self.kept_shift is None),
            (self.tile, self.precision, self.plan, None if update is None else update.key),
        )
        self.updating = NO_UPDATE if update is None else Updating(update)
        self.updating.launch_numbers(self.launch)

    def _tile_for_prototypes(self, update: PrototypeUpdate | None) -> tiles.Tile | None:
        """Tile of the kernel that multiplies and projects the prototypes' gradient; None: a library product serves.

        That kernel needs the products x·w of each tile, which kept exponentials are there to save. Where prototypes
        keep their length there is no projection, and the library's product is all.
        """
        alone = self.normalize_prototypes and self.in_place and self.kept is None and self.sub_centers == 1
        if not alone or (update is not None and update.needs_rows):
            return None
        samples, updated = self.features.shape[0], update is not None
        return tiles.prototype_gradient_tile(self.arch, self.dtype, self.precision, samples, updated)

    def slabs(self) -> Iterator[Slab]:
        """All slabs in order of their classes; they share their memory."""
        for first in range(0, self.classes, self.plan.classes):
            stop = min(first + self.plan.classes, self.classes)
            here = slice(self.sub_centers * first, self.sub_centers * stop)
            operand = prototypes = part(self.prototypes, here)
            some = slice(0, here.stop - here.start)
            factor, copy_factor = part(self.class_scale, here), None
            grad = part(self.grad_prototypes, some if self.by_slab else here)
            if self._copy is not None:
                operand = part(self._copy, some)
                factor = copy_factor = torch.empty(some.stop, dtype=torch.float32, device=operand.device)
            wide = None if self.along is not None else grad if self._slab_sum is None else part(self._slab_sum, some)
            yield Slab(first, prototypes, operand, factor, copy_factor, wide, grad)

    def launch_samples(self) -> None:
        """Write the features' operand (N, D), labels (k, N) with -1 for none, and sample gradients (3 + k, N)."""
        (samples, width), copy = self.features.shape, self.unit
        tile = tiles.row_tile(width)
        self.launch(sample_gradient_kernel, (ceil_div(samples, tile.rows),))(
            # inputs
            self.features,
            self.labels,
            self.coefficients,
            self.upstream,
            self.inverse_weight_sum,
            self.max_coefficient,
            self.max_upstream,
            # outputs
            copy,
            self._label,
            self._sample_gradients,
            self._sums_factor,
            # sizes
            samples,
            self.classes,
            width,
            *self.features.stride(),
            self.labels.stride(0),
            self.coefficients.stride(0),
            self.upstream_stride,
            copy.stride(0),
            0 if self.labels.dim() == 1 else self.labels.stride(1),
            5 if self.with_norm else 4,
            self.ignore_index,
            self.scale,
            # constants
            TARGETS=self.targets,
            COPY=self.feature_copy,
            FOLD=self.fold,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )

    def launch_tiles(self, rows: slice, slab: Slab) -> list[Tensor]:
        """Return dZ (n, c) of these samples and this slab for each sub-centre, in memory that the next call reuses."""
        features, label = part(self.unit, rows), part(self._label, rows, 1)
        sample_gradients = part(self._sample_gradients, rows, 1)
        prototypes, tile = beside_each_other(slab.operand, self.sub_centers), self.tile
        samples, classes = len(features), len(prototypes)
        here, class_tiles = slice(slab.first, slab.first + classes), ceil_div(classes, tile.classes)
        columns = slab_columns(classes, tile.classes, self.sub_centers)
        slab_part = part(part(self._slab, slice(0, samples)), slice(0, self.sub_centers * columns), 1)
        kept = None if self.kept is None else self.kept.rows(rows)
        shifts = None if kept is None or self.kept_shift is not None else kept.shifts
        tf32 = self.dtype == torch.float32 and self.precision == "tf32"
        self.launch(gradient_tile_kernel, (ceil_div(samples, tile.rows) * class_tiles,))(
            # inputs
            None if kept else block_source(features, tile.rows, tile.depth, self.described, tf32),
            None if kept else block_source(prototypes, tile.classes, tile.depth, self.described, tf32),
            slab.factor,
            None if kept else part(self.prior, here),
            label,
            sample_gradients,
            part(self.threshold, rows),
            self.polynomial,
            block_source(kept.values, tile.rows, tile.classes, self.described) if kept else None,
            shifts,
            # outputs
            block_source(slab_part, tile.rows, tile.classes, self.described),
            self.along,
            self._sums,
            # sizes
            samples,
            classes,
            features.shape[1],
            here.start,
            class_tiles,
            sample_gradients.stride(0),
            label.stride(0),
            features.stride(0),
            prototypes.stride(0),
            slab_part.stride(0),
            kept.values.stride(0) if kept else None,
            None if shifts is None else shifts.stride(0),
            self.kept_shift,
            # constants
            DESCRIBED=self.described,
            SMOOTH=self.smooth,
            FOLD=self.fold,
            PRECISION=None if kept else self.precision,
            GROUP=_GROUP,
            SUB_CENTERS=self.sub_centers,
            TARGETS=self.targets,
            KEPT_CLASSES=None if shifts is None or self.kept is None else self.kept.tile_classes,
            **tile.constants,
        )
        if self.through_r is not None and self._sums is not None and self._sums_factor is not None:
            blocks = ceil_div(samples, tile.rows)
            sums = part(self._sums, slice(0, blocks * classes)).view(blocks, classes).sum(0)
            part(self.through_r, here).addcmul_(sums, self._sums_factor)
        return [part(slab_part, slice(k * columns, k * columns + classes), 1) for k in range(self.sub_centers)]

    def launch_prototypes(self, dz: Tensor, slab: Slab) -> None:
        """Multiply and project the gradient of a slab of prototypes from dZ (N, c), or update them, in one launch."""
        tile, (samples, classes), width = self.projecting_tile, dz.shape, self.unit.shape[1]
        assert tile is not None
        self.launch(prototype_gradient_kernel, (ceil_div(classes, tile.classes) * ceil_div(width, tile.depth),))(
            # inputs
            block_source(dz, tile.rows, tile.classes, self.described),
            block_source(self.unit, tile.rows, tile.depth, self.described),
            block_source(slab.prototypes, tile.classes, tile.depth, self.described),
            slab.factor,
            self.along,
            self.updating.numbers,
            # outputs
            slab.grad,
            # updated
            *self.updating.states(slab.first, classes),
            # sizes
            samples,
            classes,
            width,
            ceil_div(samples, self.tile.rows),
            dz.stride(0),
            self.unit.stride(0),
            slab.prototypes.stride(0),
            1.0 / (self.scale * LOG2E),
            *self.updating.place(slab.first),
            # constants
            **self.updating.constants,
            DESCRIBED=self.described,
            PRECISION=self.precision,
            **tile.constants,
        )

    def launch_projection(self, slab: Slab) -> None:
        """Project the gradient of a slab of prototypes, or update them; with the last slab project that of features."""
        prototypes, prototype_sum = slab.prototypes, slab.sum
        updating = self.updating if prototype_sum is not None else NO_UPDATE
        last = self.sub_centers * slab.first + len(prototypes) == len(self.prototypes)
        feature_sum = self.feature_sum if last else None
        if feature_sum is None and prototype_sum is None:
            return
        (samples, width), classes = self.features.shape, prototypes.shape[0]
        tile = tiles.row_tile(width, self.features.stride(0), prototypes.stride(0))
        feature_blocks = 0 if feature_sum is None else ceil_div(samples, tile.rows)
        prototype_blocks = 0 if prototype_sum is None else ceil_div(classes, tile.rows)
        self.launch(projection_kernel, (feature_blocks + prototype_blocks,))(
            # inputs
            feature_sum,
            prototype_sum,
            self.features,
            prototypes,
            self.labels,
            self.coefficients[4] if self.with_norm else None,
            self.upstream,
            self.inverse_weight_sum,
            self.max_coefficient,
            self.max_upstream,
            updating.numbers,
            # outputs
            self.grad_features,
            slab.grad,
            # updated
            *updating.states(self.sub_centers * slab.first, classes),
            updating.exponents(self.sub_centers * slab.first, classes),
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
            *updating.place(self.sub_centers * slab.first),
            # constants
            **updating.constants,
            FEATURE_COPY=self.feature_copy,
            PROTOTYPE_COPY="none" if self.in_place else "scaled",
            NORMALIZE_PROTOTYPES=self.normalize_prototypes,
            UNIT=tile.unit,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )
