"""How much is done at a time: a memory limit becomes slabs, row chunks and splits."""

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

# Up to so many samples a pass takes as long as the prototypes take to be read: they are read once, whatever it costs.
FEW_SAMPLES = 512
# The forward promises less: what it holds beside its results stays in the second-level cache.
_FORWARD_BYTES = 8 << 20
# Bytes of unit features held at a time. Smaller chunks of samples read all prototypes once more each, so a chunk never
# falls below the number of rows on the next line.
_FEATURE_BYTES = 6 << 20
_LEAST_ROWS = 512
# Copied prototypes in the forward: large enough for a full wave of tiles, small enough to be read back from the cache.
_COPY_BYTES = 32 << 20
# However small the limit or long the batch, a slab holds this many classes: below, launches take longer than products.
_LEAST_CLASSES = 1024
_MOST_ROWS = 32768


class ForwardPlan(NamedTuple):
    """``rows`` samples at a time; ``classes`` of a slab; ``splits`` of a slab's tiles over the multiprocessors."""

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
    """Into how many ranges to split the class tiles, so that all ``slots`` finish at about the same time.

    The time is ⌈programs/slots⌉ waves of ⌈tiles/splits⌉ tiles, and one tile's time to start each; of equally good
    choices the fewest splits.
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
    """Choose the forward's chunks; an itemsize, of the copies of either operand, is 0 where it is read in place."""
    class_tiles = ceil_div(classes, tile_classes)
    # One flag per tile, and the partial sums, are all that grows with both N and C.
    rows = min(samples, _round_down(_FORWARD_BYTES // class_tiles * tile_rows, tile_rows))
    if feature_itemsize:
        # Copied prototypes are copied again for every chunk: then fewer chunks are worth more memory.
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
        tile_classes: slabs are a multiple of it.
        limit: bytes for everything together; kept unless the batch alone takes more.
        reread, cache: bytes of each class that are read again beside its dZ, which for few samples stay in ``cache``
            (0: no matter).
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
    """Columns of each sub-centre in a slab of dZ: whole tiles where those of another one are behind them."""
    return classes if sub_centers == 1 else _round_up(classes, tile_classes)


def in_waves(classes: int, width: int, slots: int) -> int:
    """At most so many classes, of which a library product (classes, N)·(N, width) makes just under whole waves.

    In tiles of 128 by 256, one on each of ``slots`` multiprocessors: 8448 classes of width 512 are one wave of 132.
    """
    rows = slots // ceil_div(width, 256) * 128
    return classes if rows == 0 or classes < rows else classes // rows * rows


def parts_of_product(rows: int, width: int, depth: int, slots: int) -> int:
    """Into how many parts of ``depth`` a product with a result (rows, width) is cut, so that all ``slots`` have a tile.

    A library's tiles are some 128 by 256; a part of fewer than 1024 would be read faster than it is started.
    """
    tiles = ceil_div(rows, 128) * ceil_div(width, 256)
    return max(1, min(slots // tiles, depth // 1024))


def search_rows(rows: int, tiles: int, candidates: int, limit: int) -> int:
    """Rows of a search for several classes at a time: 8 bytes for each tile, or for each candidate, and its choice."""
    per_row = 3 * 8 * max(tiles, candidates)  # the keys, and twice as much while the largest are picked
    return max(1, min(rows, limit // per_row))
