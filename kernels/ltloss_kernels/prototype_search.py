"""Host side of the searches among prototypes: nearest prototype, its gradient, and the k best classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltloss_kernels.config import tile_table as tiles
from ltloss_kernels.config.chunking import ceil_div, search_rows, splits_for
from ltloss_kernels.config.operands import block_source, padded_matrix, product_dtype, readable_in_place
from ltloss_kernels.config.precision import product_precision
from ltloss_kernels.device.search_backward import chunk_sum_kernel, nearest_gradient_kernel
from ltloss_kernels.device.search_first_pass import LAST_NUMBER, LOWEST_KEY, best_tile_kernel, nearest_prototype_kernel
from ltloss_kernels.device.search_second_pass import (
    arrange_pairs_kernel,
    count_tiles_kernel,
    pair_cosine_kernel,
    tile_candidates_kernel,
)
from ltloss_kernels.row_norms import row_norms
from ltloss_kernels.running import on_device, widened

__all__ = [
    "CHUNK",
    "GROUP",
    "MOST_ROWS",
    "PAIRS_PER_PROGRAM",
    "nearest_prototype",
    "nearest_prototype_gradient",
    "top_k",
]

# The side, in tiles, of a square of tiles that run together; see triangle_tile.
GROUP = 16
PAIRS_PER_PROGRAM = 1024
# Rows of a subset that are gathered at a time.
MOST_ROWS = 16384
# Entries of a chunk of the gradient, see search_backward. A multiple of the entries that a program loads at a time.
CHUNK = 256


def _operand(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand of a product for ``vectors`` (K, D): the vectors, or uninitialised memory for a scaled copy."""
    if readable_in_place(vectors, dtype):
        return vectors
    return padded_matrix(vectors.shape[0], vectors.shape[1], dtype, vectors.device)


class _Classes:
    """The prototypes (C, D) as the matrix unit reads them, and the launches over them.

    Args:
        prototypes: any half, float32 or float8 dtype, any strides.
        dtype: of the product.
        precision: "ieee" or "tf32", of a float32 product.
    """

    def __init__(self, prototypes: Tensor, dtype: torch.dtype, precision: str) -> None:
        device = prototypes.device
        arch = tiles.architecture(device)
        self.original, self.precision, self.device = prototypes, precision, device
        self.tile, self.described = tiles.search_tile(arch, dtype, precision), tiles.has_copy_engine(arch)
        self.pair_tile = tiles.candidate_tile(arch, dtype, precision)
        self.count, self.width = prototypes.shape
        self.tiles = ceil_div(self.count, self.tile.classes)
        self.factor = torch.empty(self.tiles * self.tile.classes, dtype=torch.float32, device=device)
        self.matrix = _operand(prototypes, dtype)
        if self.matrix is prototypes:
            row_norms(prototypes, factor=self.factor)
        else:
            row_norms(prototypes, copy=self.matrix, copy_factor=self.factor)

    def _constants(self) -> dict[str, object]:
        return {"DESCRIBED": self.described, "PRECISION": self.precision, **self.tile.constants}

    def no_keys(self, rows: int) -> Tensor:
        """Keys (rows,) that are less than all others."""
        return torch.full((rows,), LOWEST_KEY, dtype=torch.int64, device=self.device)

    def best_tiles_of_all(self) -> Tensor:
        """Keys (C,) of the tiles that hold each prototype's nearest other one; each unordered pair is computed once."""
        best = self.no_keys(self.count)
        squares = ceil_div(self.tiles, GROUP)
        nearest_prototype_kernel[(GROUP * GROUP * (squares + 1), ceil_div(squares, 2))](
            # inputs
            block_source(self.matrix, self.tile.rows, self.tile.depth, self.described),
            block_source(self.matrix, self.tile.classes, self.tile.depth, self.described),
            self.factor,
            # outputs
            best,
            # sizes
            self.count,
            self.width,
            self.tiles,
            self.matrix.stride(0),
            # constants
            GROUP=GROUP,
            **self._constants(),
        )
        return best

    def best_tiles(self, rows: Tensor, own: Tensor | None, best: Tensor) -> None:
        """Write keys of rows (n, D), leaving out the class ``own`` (n,) of each, unless that is None.

        best (n,), which must hold the lowest keys: the best tile of each row. best (n, tiles): every tile.
        """
        row_blocks = ceil_div(rows.shape[0], self.tile.rows)
        splits = splits_for(row_blocks, self.tiles, 2 * tiles.multiprocessors(self.device))
        best_tile_kernel[(row_blocks, splits)](
            # inputs
            block_source(rows, self.tile.rows, self.tile.depth, self.described),
            block_source(self.matrix, self.tile.classes, self.tile.depth, self.described),
            self.factor,
            own,
            # outputs
            best,
            # sizes
            rows.shape[0],
            self.count,
            self.width,
            self.tiles,
            ceil_div(self.tiles, splits),
            rows.stride(0),
            self.matrix.stride(0),
            # constants
            EVERY_TILE=best.dim() == 2,
            **self._constants(),
        )

    def _arranged(self, best: Tensor) -> Tensor:
        """Numbers (pairs,) int32 of the pairs with keys ``best`` (pairs,), sorted by tile."""
        order = torch.empty(best.shape, dtype=torch.int32, device=self.device)
        counts = torch.zeros(self.tiles, dtype=torch.int32, device=self.device)
        grid = (ceil_div(best.numel(), PAIRS_PER_PROGRAM),)
        count_tiles_kernel[grid](best, counts, best.numel(), BLOCK=PAIRS_PER_PROGRAM)
        starts = counts.cumsum(0, dtype=torch.int32).sub_(counts)
        arrange_pairs_kernel[grid](best, starts, order, best.numel(), BLOCK=PAIRS_PER_PROGRAM)
        return order

    def candidates(
        self, rows: Tensor, best: Tensor, own: Tensor | None, per_row: int, index: Tensor | None, keys: Tensor | None
    ) -> None:
        """The second pass over (row, tile) pairs; the keys ``best`` (pairs,) hold the tiles.

        Writes the nearest class to ``index`` (pairs,), or the keys of all classes of the tile to ``keys``
        (pairs, classes of a tile). See :func:`tile_candidates_kernel` for ``rows`` and ``own``.
        """
        tile = self.pair_tile
        tile_candidates_kernel[(ceil_div(best.numel(), tile.rows),)](
            # inputs
            rows,
            self.matrix,
            self.factor,
            own,
            best,
            self._arranged(best),
            # outputs
            index,
            keys,
            # sizes
            best.numel(),
            per_row,
            self.count,
            self.width,
            rows.stride(0),
            self.matrix.stride(0),
            # constants
            PRECISION=self.precision,
            **tile.constants,
        )

    def cosines(self, rows: Tensor, own: Tensor | None, per_row: int, index: Tensor, cosine: Tensor) -> None:
        """Write the cosines of the original rows with the classes ``index``; both contiguous, (pairs,) or (n, k)."""
        tile = tiles.row_tile(self.width)
        pair_cosine_kernel[(ceil_div(index.numel(), tile.rows),)](
            # inputs
            rows,
            self.original,
            own,
            index,
            # outputs
            cosine,
            # sizes
            index.numel(),
            per_row,
            self.width,
            *rows.stride(),
            *self.original.stride(),
            # constants
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
        )


def nearest_prototype(prototypes: Tensor, rows: Tensor | None, allow_tf32: bool) -> tuple[Tensor, Tensor]:
    """The largest cosine of each prototype to another one, and the index of that one, the lowest of equal ones.

    Args:
        prototypes: (C, D); any half, float32 or float8 dtype, any strides.
        rows: (R,) int64 in [0, C), or None for all (R = C).
        allow_tf32: False keeps float32 products float32, whatever ``torch.set_float32_matmul_precision`` allows.

    Returns:
        Cosines (R,) float32 and indices (R,) int64; both -1 if C = 1.

    Raises:
        RuntimeError: kernels cannot run on the device of the prototypes.
    """
    count = prototypes.shape[0] if rows is None else rows.shape[0]
    if prototypes.shape[0] == 1 or count == 0:
        alone = torch.full((count,), -1, dtype=torch.int64, device=prototypes.device)
        return alone.to(torch.float32), alone
    prototypes = widened(prototypes)
    with on_device(prototypes):
        dtype = product_dtype(prototypes.dtype, prototypes.dtype)
        classes = _Classes(prototypes, dtype, product_precision() if allow_tf32 else "ieee")
        cosine = torch.empty(count, dtype=torch.float32, device=prototypes.device)
        index = torch.empty(count, dtype=torch.int64, device=prototypes.device)
        for start in range(0, count, count if rows is None else MOST_ROWS):
            own = None if rows is None else rows[start : start + MOST_ROWS].contiguous()
            here = slice(start, count if own is None else start + own.shape[0])
            if own is None:
                best = classes.best_tiles_of_all()
            else:
                best = classes.no_keys(own.shape[0])
                classes.best_tiles(_gathered(classes.matrix, own), own, best)
            classes.candidates(classes.matrix, best, own, 1, index[here], None)
            classes.cosines(prototypes, own, 1, index[here], cosine[here])
        return cosine, index


def _gathered(matrix: Tensor, rows: Tensor) -> Tensor:
    """A copy of these rows of a matrix, readable in place."""
    gathered = matrix.index_select(0, rows)
    if readable_in_place(gathered, matrix.dtype):
        return gathered
    width, unit = matrix.shape[1], 16 // matrix.element_size()
    return torch.nn.functional.pad(gathered, (0, -width % unit))[:, :width]


def top_k(features: Tensor, prototypes: Tensor, k: int, *, limit: Callable[[], int]) -> tuple[Tensor, Tensor]:
    """The k classes with the largest cosine to each feature, best first, equal cosines in class order.

    The k best tiles of a row hold its k best classes. Were one of them in another tile, each of the k tiles would have
    a class that is better, or equal and lower.

    Args:
        features: (N, D), prototypes: (C, D) with C >= k; any half or float32 dtype, any strides. Prototypes also in
            float8, and then features too.
        k: at least 1.
        limit: returns how many bytes the keys of a chunk of the features may take.

    Returns:
        Cosines (N, k) float32 and indices (N, k) int64.

    Raises:
        RuntimeError: kernels cannot run on the device of the features.
    """
    if features.shape[0] == 0:
        return features.new_empty((0, k), dtype=torch.float32), features.new_empty((0, k), dtype=torch.int64)
    features, prototypes = widened(features), widened(prototypes)
    with on_device(features):
        wide = prototypes.dtype == torch.float32  # nothing is rounded that was not rounded before
        dtype = torch.float32 if wide else product_dtype(features.dtype, prototypes.dtype)
        classes = _Classes(prototypes, dtype, product_precision())
        tiles_per_row = min(k, classes.tiles)
        cosine = torch.empty(features.shape[0], k, dtype=torch.float32, device=features.device)
        index = torch.empty(features.shape[0], k, dtype=torch.int64, device=features.device)
        chunk = search_rows(features.shape[0], classes.tiles, tiles_per_row * classes.tile.classes, limit())
        for start in range(0, features.shape[0], chunk):
            rows = features[start : start + chunk]
            index[start : start + chunk], cosine[start : start + chunk] = _top_of_chunk(
                classes, rows, dtype, k, tiles_per_row
            )
        return cosine, index


def _top_of_chunk(
    classes: _Classes, features: Tensor, dtype: torch.dtype, k: int, tiles_per_row: int
) -> tuple[Tensor, Tensor]:
    """Indices and cosines (n, k) of the best classes of some features (n, D)."""
    count, device = features.shape[0], features.device
    rows = _operand(features, dtype)
    if rows is not features:
        scratch = torch.empty(count, dtype=torch.float32, device=device)
        row_norms(features, copy=rows, copy_factor=scratch)
    keys = torch.empty(count, classes.tiles, dtype=torch.int64, device=device)
    classes.best_tiles(rows, None, keys)
    best = keys.topk(tiles_per_row, dim=1).values.contiguous().view(-1)
    del keys
    candidates = torch.empty(count * tiles_per_row, classes.tile.classes, dtype=torch.int64, device=device)
    classes.candidates(rows, best, None, tiles_per_row, None, candidates)
    # No two keys of a row are equal, so the choice and its order are unique.
    index = LAST_NUMBER - (candidates.view(count, -1).topk(k, dim=1).values & LAST_NUMBER)
    del candidates
    cosine = torch.empty(count, k, dtype=torch.float32, device=device)
    classes.cosines(features, None, k, index, cosine)
    # The cosines in float32 may order neighbours differently than the product did.
    index, order = index.sort(dim=1)
    cosine, second = cosine.gather(1, order).sort(dim=1, descending=True, stable=True)
    return index.gather(1, second), cosine


def nearest_prototype_gradient(grad_cosine: Tensor, prototypes: Tensor, own: Tensor | None, near: Tensor) -> Tensor:
    """Gradient of the cosines of :func:`nearest_prototype` for the prototypes.

    Beside the result it allocates the sorted ends of the pairs, and partial sums: a row for every CHUNK ends,
    (2·R // CHUNK, D) float32, which is a 128th of (R, D).

    Args:
        grad_cosine: (R,), the upstream gradient, any stride.
        prototypes: (C, D); any half or float32 dtype, any strides.
        own: (R,) int64, or None for all classes in order (R = C).
        near: (R,) int64, the nearest prototype of each.

    Returns:
        (C, D) in the dtype of ``prototypes``.

    Raises:
        RuntimeError: kernels cannot run on the device of the prototypes.
    """
    if prototypes.shape[0] == 1 or near.numel() == 0:
        return torch.zeros(prototypes.shape, dtype=prototypes.dtype, device=prototypes.device)
    given, prototypes = prototypes, widened(prototypes)
    with on_device(prototypes):
        classes, width = prototypes.shape
        every = torch.arange(classes + 1, device=prototypes.device)
        # A stable sort keeps the pairs of a class in their order, so that its sum is the same each time.
        ends, order = torch.cat([every[:-1] if own is None else own, near]).sort(stable=True)
        starts = torch.searchsorted(ends, every)
        grad = torch.empty(classes, width, dtype=prototypes.dtype, device=prototypes.device)
        tile = tiles.row_tile(width)
        partial = torch.empty(order.shape[0] // CHUNK, width, dtype=torch.float32, device=prototypes.device)
        pairs = prototypes, own, near, grad_cosine, order
        sizes = near.shape[0], width, *prototypes.stride(), grad_cosine.stride(0)
        constants = {"CHUNK": CHUNK, "ENTRIES": tile.rows, "WIDTH": tile.width, "num_warps": tile.warps}
        if len(partial) > 0:
            chunk_sum_kernel[(len(partial),)](
                # inputs
                *pairs,
                ends,
                starts,
                # outputs
                partial,
                # sizes
                *sizes,
                # constants
                **constants,
            )
        nearest_gradient_kernel[(classes,)](
            # inputs
            *pairs,
            starts,
            partial,
            # outputs
            grad,
            # sizes
            *sizes,
            # constants
            **constants,
        )
    return grad.to(given.dtype)
