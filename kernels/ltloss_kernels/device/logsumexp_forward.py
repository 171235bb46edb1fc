"""Forward: partial sums of the log-sum-exp of the cosine logits over the other classes, and the target cosine.

With l_ic = s·cos_ic + b_c, in units of log 2 throughout the tiles: l·log2 e = (x̂_i·w_c)·(s·log2 e/‖w_c‖) + b_c·log2 e.
Unit features are a small copy, rounded as plain PyTorch would round them; prototypes go into the product as they are,
and their lengths enter behind it, in float32: one multiply-add per element.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from ltloss_kernels.device.elementary import LN2, LOG2E, log
from ltloss_kernels.device.tile_io import holds_a_label, inverse_lengths, load_block, store_block, tile_product

__all__ = [
    "add_splits",
    "bent",
    "combine_splits",
    "cosine_logsumexp_kernel",
    "load_thresholds",
    "tile_logits",
]


@triton.jit
def prior_log2(prior_ptr, classes_here, classes, RAW: tl.constexpr):
    """b·log2 e of some classes, which the vector holds unless it is RAW; anything beyond the classes."""
    if RAW:
        prior = tl.load(prior_ptr + classes_here, mask=classes_here < classes, other=0.0) * LOG2E
    else:
        prior = tl.load(prior_ptr + classes_here)
    return prior


@triton.jit
def load_thresholds(threshold_ptr, rows, inside):
    """Those of some rows (R,), in units of log 2; or None."""
    thresholds = None
    if threshold_ptr is not None:
        thresholds = tl.load(threshold_ptr + rows, mask=inside, other=0.0) * LOG2E
    return thresholds


@triton.jit
def bent(logit, threshold, polynomial_ptr):
    """What becomes of logits (R, C) beyond the threshold (R,) of their row, and the slope of that; 1 below.

    p0 + p1·l + p2·l² with the polynomial (3,) in natural units, all else in those of log 2. Without thresholds nothing
    changes.
    """
    slope = 1.0
    if threshold is not None:
        p0, p1 = tl.load(polynomial_ptr) * LOG2E, tl.load(polynomial_ptr + 1)
        p2 = tl.load(polynomial_ptr + 2) * LN2
        hard = logit > threshold[:, None]
        slope = tl.where(hard, 2.0 * p2 * logit + p1, 1.0)
        logit = tl.where(hard, (p2 * logit + p1) * logit + p0, logit)
    return logit, slope


@triton.jit
def store_unless_none(target_ptr, cell, values, inside):
    """What was asked for."""
    if target_ptr is not None:
        tl.store(target_ptr + cell, values, mask=inside)


@triton.jit
def keep_tile(kept, exponentials, block, column, samples, classes, stride, DESCRIBED: tl.constexpr):
    """A tile (R, C) into the matrix of all of them, unless that is None."""
    if kept is not None:
        ROWS: tl.constexpr = exponentials.shape[0]
        COLUMNS: tl.constexpr = exponentials.shape[1]
        store_block(
            kept, exponentials, block * ROWS, column, samples, classes, stride, ROWS, COLUMNS, DESCRIBED, True
        )  # fmt: skip


@triton.jit
def load_scales(logit_scale_ptr, at, known):
    """Those of some prototypes (C,); 0 where they are not ``known``, unless that is None and all are."""
    return tl.load(logit_scale_ptr + at) if known is None else tl.load(logit_scale_ptr + at, mask=known, other=0.0)


@triton.jit
def tile_logits(
    features, prototypes, logit_scale_ptr, block, tile, here, known, samples, classes, width, features_stride,
    prototypes_stride, resident, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, SUB_CENTERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits (R, C) of a tile in units of log 2; x·w (R, C) and scale (C,) of the last sub-centre; which is nearest.

    A row of the prototypes holds the SUB_CENTERS of a class beside each other, and logit_scale as many entries for it.
    The logit is the largest of theirs, the nearest (R, C) of equal ones the lowest; of a single one the number 0.
    """
    for k in tl.static_range(SUB_CENTERS):
        product, _ = tile_product(
            features, prototypes, block, tile, samples, classes, width, features_stride, prototypes_stride,
            DESCRIBED, PRECISION, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_DEPTH, False, resident,
            k * (prototypes_stride // SUB_CENTERS),
        )  # fmt: skip
        scale = load_scales(logit_scale_ptr, here * SUB_CENTERS + k, known)
        own = product * scale[None, :]
        if k == 0:
            logit = own
            nearest = 0
            if SUB_CENTERS > 1:
                nearest = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.int32)
        else:
            nearest = tl.where(own > logit, k, nearest)
            logit = tl.maximum(logit, own, propagate_nan=tl.PropagateNan.ALL)
    return logit, product, scale, nearest


@triton.jit
def add_exponentials(total, largest, logit, ONLINE: tl.constexpr):
    """Σ 2^l of each row of a tile (R, C), onto a total (R,); if ONLINE relative to the running maximum (R,).

    Returns the total, the maximum, the exponentials (R, C), and what was taken off their exponents (R,).
    """
    base = largest
    if ONLINE:
        new = tl.maximum(largest, tl.max(logit, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no other class yet: -inf - -inf would be NaN
        total = total * tl.exp2(largest - base)
        exponentials = tl.exp2(logit - base[:, None])
        total += tl.sum(exponentials, 1)
        largest = new
    else:
        exponentials = tl.exp2(logit)
        total += tl.sum(exponentials, 1)
    return total, largest, exponentials, base


@triton.jit(
    do_not_specialize=[
        "samples",
        "classes",
        "first_tile",
        "slab_tiles",
        "class_tiles",
        "tiles_per_split",
        "first_split",
        "slab_classes",
        "partial_stride",
    ]
)
def cosine_logsumexp_kernel(
    # inputs
    features,
    prototypes,
    logit_scale_log2_ptr,
    prior_ptr,
    label_ptr,
    flags_ptr,
    threshold_ptr,
    polynomial_ptr,
    # outputs
    partial_sum_ptr,
    partial_max_ptr,
    partial_logit_ptr,
    kept,
    kept_shift_ptr,
    # sizes
    samples,
    classes,
    width,
    first_tile,
    slab_tiles,
    class_tiles,
    tiles_per_split,
    first_split,
    slab_classes,
    features_stride,
    prototypes_stride,
    partial_stride,
    kept_stride,
    shift,
    factor_scale,
    # constants
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    NORMS: tl.constexpr,
    RESIDENT: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Partial sums over the other classes of exp(l - shift): one row block by one range of class tiles per program.

    features: (samples, width); prototypes: a slab of the classes, (slab_classes, width), whose first tile is the
    ``first_tile``-th of all; both are descriptors if DESCRIBED. label (TARGETS, samples); flags (row blocks,
    class_tiles); logit_scale_log2 s·log2 e/‖w‖ and prior b·log2 e (class_tiles · BLOCK_CLASSES,), 0 and -inf beyond the
    classes.
    With NORMS the tiles find the lengths themselves, so that prototypes are read once: logit_scale_log2 (classes,) is
    an output, factor_scale/‖w‖; prior (classes,) is in natural units; there are no flags, each tile looks for labels.
    RESIDENT: BLOCK_DEPTH covers all columns, and the row block is loaded once. With more than one of SUB_CENTERS a row
    of the prototypes holds those of a class beside each other, and logit_scale_log2 as many entries for it.
    threshold (samples,) and polynomial (3,), or None: see :func:`bent`.
    partial_sum (splits, samples): Σ 2^(l·log2 e - shift). The shift, in units of log 2, is the argument, or the running
    maximum of each row, which partial_max (splits, samples) returns unless it is None. partial_logit (splits, samples)
    or None: Σ s·cos over all classes of the range. Rows of the three are ``partial_stride`` apart.
    kept (samples, classes filled up to 16 bytes) or None: the summed exponentials themselves, 0 for the target; a
    descriptor if DESCRIBED. With a running maximum kept_shift (class_tiles, samples), rows of the whole batch apart:
    what each tile took off the exponents of its row.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < samples
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    logit_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, slab_tiles)
    resident = None
    if RESIDENT:
        resident = load_block(
            features, block * BLOCK_ROWS, 0, samples, width, features_stride, BLOCK_ROWS, BLOCK_DEPTH, DESCRIBED
        )
    label_at = label_ptr + rows
    if NORMS:
        label = tl.load(label_at, mask=inside, other=-1)
    threshold = load_thresholds(threshold_ptr, rows, inside)
    tl.assume(width > 0)  # else the flattened loop has a second body, for products of no columns
    for tile in tl.range(first, last, flatten=True):
        column = (first_tile + tile) * BLOCK_CLASSES
        here = column + tl.arange(0, BLOCK_CLASSES)
        if NORMS:
            product, squares = tile_product(
                features, prototypes, block, tile, samples, slab_classes, width, features_stride, prototypes_stride,
                DESCRIBED, PRECISION, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_DEPTH, True, resident,
            )  # fmt: skip
            logit_scale_log2 = factor_scale * inverse_lengths(
                squares, prototypes, tile, slab_classes, width, prototypes_stride, DESCRIBED, BLOCK_CLASSES, BLOCK_DEPTH
            )
            if block == 0:
                tl.store(logit_scale_log2_ptr + here, logit_scale_log2, mask=here < classes)
            special = holds_a_label(label, column, BLOCK_CLASSES) | (column + BLOCK_CLASSES > classes)
            logit = product * logit_scale_log2[None, :]
        else:
            logit, _, _, _ = tile_logits(
                features, prototypes, logit_scale_log2_ptr, block, tile, here, None, samples, slab_classes, width,
                features_stride, prototypes_stride, resident, DESCRIBED, PRECISION, SUB_CENTERS, BLOCK_ROWS,
                BLOCK_CLASSES, BLOCK_DEPTH,
            )  # fmt: skip
            special = tl.load(flags_ptr + block.to(tl.int64) * class_tiles + first_tile + tile) != 0
        if partial_logit_ptr is not None:
            logit_sum += tl.sum(logit, 1)
        logit, _ = bent(logit, threshold, polynomial_ptr)
        if prior_ptr is not None:
            logit += prior_log2(prior_ptr, here, classes, NORMS)[None, :]
        elif partial_max_ptr is None:
            logit -= shift
        if special:
            if not NORMS:
                label = tl.load(label_at, mask=inside, other=-1)
            logit = tl.where((here[None, :] == label[:, None]) | (here[None, :] >= classes), float("-inf"), logit)
            for place in tl.static_range(1, TARGETS):
                label = tl.load(label_at + place * samples.to(tl.int64), mask=inside, other=-1)
                logit = tl.where(here[None, :] == label[:, None], float("-inf"), logit)
        total, largest, exponentials, base = add_exponentials(total, largest, logit, partial_max_ptr is not None)
        keep_tile(kept, exponentials, block, column, samples, classes, kept_stride, DESCRIBED)
        cell = (first_tile + tile).to(tl.int64) * partial_stride + rows
        store_unless_none(kept_shift_ptr, cell, base, inside)
    cell = (first_split + split).to(tl.int64) * partial_stride + rows
    store_unless_none(partial_sum_ptr, cell, total, inside)
    store_unless_none(partial_max_ptr, cell, largest, inside)
    store_unless_none(partial_logit_ptr, cell, logit_sum * LN2, inside)


@triton.jit
def load_splits(partial_ptr, start, rows, inside, samples, splits, other, SPLITS: tl.constexpr):
    """(SPLITS, R) of some rows, from the split ``start`` on; ``other`` beyond the splits and the rows."""
    split = start + tl.arange(0, SPLITS)
    cells = split.to(tl.int64)[:, None] * samples + rows[None, :]
    return tl.load(partial_ptr + cells, mask=(split < splits)[:, None] & inside[None, :], other=other)


@triton.jit
def combine_splits(partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift, SPLITS: tl.constexpr = 16):
    """Add the splits of some rows: (base, total, log total) with Σ_{c≠y} exp(l) = 2^base·total; always in one order.

    SPLITS are loaded at a time: one after the other would take a microsecond for every three.
    """
    total = tl.zeros(rows.shape, tl.float32)
    base = tl.full(rows.shape, 1.0, tl.float32) * shift
    if partial_max_ptr is not None:
        base = tl.full(rows.shape, float("-inf"), tl.float32)
        for start in range(0, splits, SPLITS):
            largest = load_splits(partial_max_ptr, start, rows, inside, samples, splits, float("-inf"), SPLITS)
            base = tl.maximum(base, tl.max(largest, 0))
        base = tl.where(base == float("-inf"), 0.0, base)
    for start in range(0, splits, SPLITS):
        partial = load_splits(partial_sum_ptr, start, rows, inside, samples, splits, 0.0, SPLITS)
        if partial_max_ptr is not None:
            largest = load_splits(partial_max_ptr, start, rows, inside, samples, splits, float("-inf"), SPLITS)
            partial *= tl.exp2(largest - base[None, :])
        total += tl.sum(partial, 0)
    return base, total, log(total)


@triton.jit
def add_splits(partial_ptr, rows, inside, samples, splits, SPLITS: tl.constexpr = 16):
    """Σ over the splits of some rows, always in one order."""
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, splits, SPLITS):
        total += tl.sum(load_splits(partial_ptr, start, rows, inside, samples, splits, 0.0, SPLITS), 0)
    return total
