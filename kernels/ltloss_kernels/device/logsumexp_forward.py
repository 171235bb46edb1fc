"""Forward: partial sums of the log-sum-exp of the cosine logits over the other classes, and the target cosine.

The logits are l_ic = s·cos_ic + b_c. The tiles hold them in units of log 2:

    l·log2 e = (x̂_i·w_c)·(s·log2 e/‖w_c‖) + b_c·log2 e

Unit features are a small copy, rounded as plain PyTorch would round them. Prototypes go into the product as they are.
Their lengths are applied to the product in float32, with one multiply-add per element.
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
    """b·log2 e of some classes; arbitrary beyond the classes. The vector holds b if RAW, else b·log2 e."""
    if RAW:
        prior = tl.load(prior_ptr + classes_here, mask=classes_here < classes, other=0.0) * LOG2E
    else:
        prior = tl.load(prior_ptr + classes_here)
    return prior


@triton.jit
def load_thresholds(threshold_ptr, rows, inside):
    """The thresholds of some rows (R,), in units of log 2; None if there are none."""
    thresholds = None
    if threshold_ptr is not None:
        thresholds = tl.load(threshold_ptr + rows, mask=inside, other=0.0) * LOG2E
    return thresholds


@triton.jit
def bent(logit, threshold, polynomial_ptr):
    """Logits (R, C) with p0 + p1·l + p2·l² for each l above the threshold (R,) of its row, and the derivative.

    The derivative is 1 up to the threshold. The polynomial (3,) is in natural units, everything else in units of log 2.
    Without thresholds the logits stay as they are.
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
    """Store ``values``, unless the target is None."""
    if target_ptr is not None:
        tl.store(target_ptr + cell, values, mask=inside)


@triton.jit
def keep_tile(kept, exponentials, block, column, samples, classes, stride, DESCRIBED: tl.constexpr):
    """Store a tile (R, C) of exponentials in the matrix ``kept``, unless that is None."""
    if kept is not None:
        ROWS: tl.constexpr = exponentials.shape[0]
        COLUMNS: tl.constexpr = exponentials.shape[1]
        store_block(
            kept, exponentials, block * ROWS, column, samples, classes, stride, ROWS, COLUMNS, DESCRIBED, True
        )  # fmt: skip


@triton.jit
def load_scales(logit_scale_ptr, at, known):
    """The scales of some prototypes (C,), 0 where the mask ``known`` is False. None: all are known."""
    return tl.load(logit_scale_ptr + at) if known is None else tl.load(logit_scale_ptr + at, mask=known, other=0.0)


@triton.jit
def tile_logits(
    features, prototypes, logit_scale_ptr, block, tile, here, known, samples, classes, width, features_stride,
    prototypes_stride, resident, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, SUB_CENTERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """The logits of a tile. Returns (logit, product, scale, nearest):

        logit (R, C)    the largest of the sub-centres' logits, in units of log 2
        product (R, C)  x·w of the last sub-centre
        scale (C,)      s·log2 e/‖w‖ of the last sub-centre
        nearest (R, C)  the sub-centre of the largest logit, the lowest of equal ones; the number 0 for a single one

    A row of ``prototypes`` holds the SUB_CENTERS of a class beside each other, and logit_scale SUB_CENTERS entries.
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
    """Add Σ 2^l of each row of a tile (R, C) to ``total`` (R,), relative to the running maximum (R,) if ONLINE.

    Returns the total, the maximum, the exponentials (R, C), and the base (R,) that was subtracted from the exponents.
    """
    base = largest
    if ONLINE:
        new = tl.maximum(largest, tl.max(logit, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no other class so far: -inf minus -inf would be NaN
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
    """Partial sums of exp(l - shift) over the other classes: one row block by one range of class tiles per program.

    The shift is the argument ``shift``, or the running maximum of each row where partial_max is not None; both are in
    units of log 2.

    Inputs:
        features (samples, width), a descriptor if DESCRIBED.
        prototypes (slab_classes, width), a descriptor if DESCRIBED: a slab whose first tile is number ``first_tile`` of
            all. With several SUB_CENTERS a row holds the sub-centres of a class beside each other.
        logit_scale_log2 (class_tiles · BLOCK_CLASSES · SUB_CENTERS,): s·log2 e/‖w‖, 0 beyond the classes.
        prior (class_tiles · BLOCK_CLASSES,) or None: b·log2 e, -inf beyond the classes.
        label (TARGETS, samples): the class, or -1. flags (row blocks, class_tiles): see sample_kernel.
        threshold (samples,) and polynomial (3,), or None: see :func:`bent`.
    Outputs; all but partial_sum may be None:
        partial_sum (splits, samples): Σ 2^(l·log2 e - shift). partial_max (splits, samples): the running maximum.
        partial_logit (splits, samples): Σ s·cos over all classes of the range, without prior. Rows of these three are
            ``partial_stride`` apart.
        kept (samples, classes padded to 16 bytes), a descriptor if DESCRIBED: the summed exponentials, 0 for the
            target.
        kept_shift (class_tiles, samples), rows ``partial_stride`` apart: with a running maximum, the shift of each tile
            and row.
    NORMS: the tiles compute the lengths, so that prototypes are read once. logit_scale_log2 (classes,) is then an
    output, factor_scale/‖w‖; prior (classes,) is in natural units; flags is None, and each tile looks for labels.
    RESIDENT: BLOCK_DEPTH covers all columns, and the row block is loaded once.
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
    """Partials (SPLITS, R) of some rows, from the split ``start`` on; ``other`` beyond the splits and the rows."""
    split = start + tl.arange(0, SPLITS)
    cells = split.to(tl.int64)[:, None] * samples + rows[None, :]
    return tl.load(partial_ptr + cells, mask=(split < splits)[:, None] & inside[None, :], other=other)


@triton.jit
def combine_splits(partial_sum_ptr, partial_max_ptr, rows, inside, samples, splits, shift, SPLITS: tl.constexpr = 16):
    """Add the splits of some rows in a fixed order: (base, total, log total) with Σ_{c≠y} exp(l) = 2^base·total.

    SPLITS splits are loaded at a time; loaded one by one, every three would take a microsecond.
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
    """Σ over the splits of some rows, in a fixed order."""
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, splits, SPLITS):
        total += tl.sum(load_splits(partial_ptr, start, rows, inside, samples, splits, 0.0, SPLITS), 0)
    return total
