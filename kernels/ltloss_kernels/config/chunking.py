"""How the work is divided: a memory limit becomes slabs of classes, chunks of samples and splits."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "FEW_SAMPLES",
    "BackwardPlan",
    "ForwardPlan",
    "backward_plan",
    "ceil_div",
    "forward_plan",
    "in_waves",
    "parts_of_product",
    "search_rows",
    "slab_columns",
    "splits_for",
]

# Up to this many samples a pass is bound by reading the prototypes, so it reads them only once.
FEW_SAMPLES = 512
# Bytes that the forward holds beside its results: few enough to stay in the second-level cache.
_FORWARD_BYTES = 8 << 20
# Bytes of unit features held at a time. Every further chunk of samples reads all prototypes once more, so a chunk has
# at least _LEAST_ROWS rows.
_FEATURE_BYTES = 6 << 20
_LEAST_ROWS = 512
# Bytes of copied prototypes in the forward: enough for a full wave of tiles, few enough to be read back from the cache.
_COPY_BYTES = 32 << 20
# A slab has at least this many classes, however small the limit: with fewer, launches take longer than products.
_LEAST_CLASSES = 1024
_MOST_ROWS = 32768


class ForwardPlan(NamedTuple):
    """``rows`` samples of a chunk; ``classes`` of a slab; ``splits`` into which a slab's class tiles are divided."""

    rows: int
    classes: int
    splits: int


class BackwardPlan(NamedTuple):
    """``rows`` samples and ``classes`` of a slab of dZ."""

    rows: int
    classes: int


def ceil_div(value: int, unit: int) -> int:
    """⌈value/unit⌉ of plain integers."""
    return -(-value // unit)


def _round_down(value: int, unit: int) -> int:
    return max(unit, value // unit * unit)


def _round_up(value: int, unit: int) -> int:
    return ceil_div(value, unit) * unit


def splits_for(row_blocks: int, class_tiles: int, slots: int) -> int:
    """The number of ranges of class tiles with which all ``slots`` finish at about the same time.

    The modelled time is ⌈programs/slots⌉ waves, each of ⌈tiles/splits⌉ tiles plus one tile's time to start. Of equal
    choices the fewest splits win.
    """
    candidates = {max(1, min(class_tiles, wave * slots // row_blocks)) for wave in range(1, 5)}

    def time(splits: int) -> int:
        return ceil_div(row_blocks * splits, slots) * (1 + ceil_div(class_tiles, splits))

    return min(sorted(candidates), key=time)


def forward_plan(
    samples: int,
    classes: int,
    width: int,
    tile_rows: int,
    tile_classes: int,
    slots: int,
    copy_itemsize: int,
    feature_itemsize: int,
) -> ForwardPlan:
    """Choose chunks, slabs and splits of the forward.

    Args:
        samples, classes: N and C.
        width: columns of a class: D, or K·D with K sub-centres.
        tile_rows, tile_classes: rows and classes of a tile.
        slots: how many programs run at a time.
        copy_itemsize: bytes of an entry of the copied prototypes; 0 where they are read in place.
        feature_itemsize: bytes of an entry of the unit features; 0 where features are not normalised.
    """
    class_tiles = ceil_div(classes, tile_classes)
    # Only the flags, one per tile, and the partial sums grow with both N and C.
    rows = min(samples, _round_down(_FORWARD_BYTES // class_tiles * tile_rows, tile_rows))
    if feature_itemsize:
        # Prototypes that are copied are copied again for every chunk, so fewer chunks are worth more memory.
        bytes_for_features = _COPY_BYTES if copy_itemsize else _FEATURE_BYTES
        fits = max(_LEAST_ROWS, bytes_for_features // (width * feature_itemsize))
        chunks = ceil_div(samples, fits)  # of equal size: a short last one would leave the GPU half empty
        rows = min(rows, _round_up(ceil_div(samples, chunks), tile_rows))
    rows = min(rows, samples)
    slab = class_tiles * tile_classes
    if copy_itemsize:
        slab = min(slab, _round_down(_COPY_BYTES // (width * copy_itemsize), tile_classes))
    splits = splits_for(ceil_div(rows, tile_rows), slab // tile_classes, slots)
    return ForwardPlan(rows, slab, splits)


def backward_plan(
    samples: int,
    classes: int,
    per_sample: int,
    per_class: int,
    itemsize: int,
    tile_classes: int,
    limit: int,
    reread: int = 0,
    cache: int = 0,
) -> BackwardPlan:
    """Choose the slab of dZ.

    Args:
        samples, classes: N and C.
        per_sample, per_class: bytes held beside the slab for each sample (of all N) and each class (of a slab).
        itemsize: bytes of an entry of dZ.
        tile_classes: the classes of a slab are a multiple of it.
        limit: bytes for everything together; kept unless the batch and the smallest slab take more.
        reread: bytes of each class that are read again beside its dZ.
        cache: for few samples, a slab's dZ and what is read again take at most so many bytes; 0: no such bound.
    """
    rows = min(samples, _MOST_ROWS)
    left = limit - samples * per_sample
    fits = _round_down(left // (rows * itemsize + per_class), tile_classes) if left > 0 else tile_classes
    if cache and samples <= FEW_SAMPLES:
        fits = min(fits, _round_down(cache // (rows * itemsize + reread), tile_classes))
    slab = max(fits, min(_LEAST_CLASSES, _round_up(classes, tile_classes)))
    slabs = ceil_div(classes, slab)
    even = ceil_div(classes, slabs)
    return BackwardPlan(rows, min(classes, _round_up(even, tile_classes)))


def slab_columns(classes: int, tile_classes: int, sub_centers: int) -> int:
    """Columns that each sub-centre has in a slab of dZ: padded to whole tiles where there are several sub-centres."""
    return classes if sub_centers == 1 else _round_up(classes, tile_classes)


def in_waves(classes: int, width: int, slots: int) -> int:
    """The most classes, up to ``classes``, for which a library product (classes, N)·(N, width) fills whole waves.

    Assumes tiles of 128 by 256, one on each of ``slots`` multiprocessors: 8448 classes of width 512 are one wave of
    132.
    """
    rows = slots // ceil_div(width, 256) * 128
    return classes if rows == 0 or classes < rows else classes // rows * rows


def parts_of_product(rows: int, width: int, depth: int, slots: int) -> int:
    """The number of parts of K = ``depth`` with which a product with result (rows, width) has a tile for all ``slots``.

    Assumes library tiles of 128 by 256. A part is at least 1024 long: a shorter one is read faster than it is started.
    """
    tiles = ceil_div(rows, 128) * ceil_div(width, 256)
    return max(1, min(slots // tiles, depth // 1024))


def search_rows(rows: int, tiles: int, candidates: int, limit: int) -> int:
    """Rows of a top-k search at a time, so that their keys (8 bytes a tile or candidate) fit ``limit`` bytes."""
    per_row = 3 * 8 * max(tiles, candidates)  # the keys, and twice as much while the largest are picked
    return max(1, min(rows, limit // per_row))
